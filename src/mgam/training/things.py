"""Invented things, many of one kind, each with the same fields: what texts of many like facts are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from mgam.training.wordings import COLOURS, FAMILIES, NAMES, THINGS, training_words, words_of

Maker = Callable[[random.Random], str]
FIRST = words_of(
    "Al Ar Bel Bor Cal Cor Dal Dor El Er Fal Fen Gal Gor Hal Hest Il Ir Jar Jul Kal Ker Lan Lor Mal Mer Nal Nor Ol Or "
    "Pal Per Quin Rav Ros Sal Sel Tal Tor Ul Ur Val Ver Wel Wor Yal Zan Zel"
)
MIDDLE = words_of("a e i o u an en in on ar er or al el is os ad ab et")
LAST = words_of("dale ford mouth wick by ton stad berg ra na lo ma via dor mar nia ria ska gard burn holm ley nes vik")
KINDS_OF = words_of("coffee copper timber wool tin salt glass paper cotton rubber amber honey silk tea marble barley")
TRADES = words_of(
    "baker joiner pilot teacher printer surgeon tailor smith clerk farmer painter mason diver nurse lawyer"
)
COINS = words_of("dirin tolar marek shell crown ducat florin peso rand lat kip talent groat obol zecchin stater")
STONES = words_of("granite slate basalt limestone gneiss sandstone marble chalk dolomite quartz")
USES = words_of("tea rope dye soap medicine fodder baskets perfume candles bread")
DAYS = words_of("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words_of("January February March April May June July August September October November December")
LEAVES = words_of("wort fern thistle lily rose moss sedge clover orchid willow thorn poppy balm mallow")
MEETINGS = words_of("congress fair festival conference regatta assembly exhibition workshop council tournament")


def place(rng: random.Random) -> str:
    """The name of a place that does not exist."""
    name = rng.choice(FIRST) + (rng.choice(MIDDLE) if rng.random() < 0.6 else "") + rng.choice(LAST)
    return rng.choice(("", "", "", "Port ", "North ", "Saint ", "Old ", "Upper ")) + name


def person(rng: random.Random) -> str:
    """The name of a person."""
    return f"{rng.choice(NAMES)} {rng.choice(FAMILIES)}"


def _firm(rng: random.Random) -> str:
    one, two = rng.sample(FAMILIES, 2)
    return rng.choice(
        (f"{one} & {two}", f"{one} Works", f"{two} Brothers", f"{rng.choice(FIRST)}tec", f"{one} Trading")
    )


def _capital(rng: random.Random) -> str:
    return rng.choice(training_words()).capitalize()


def _number(rng: random.Random) -> str:
    return f"{int(10 ** rng.uniform(2, 6.5)):,}"


def _date(rng: random.Random) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1900, 2026)}"


MAKERS: dict[str, Maker] = {
    "place": place,
    "person": person,
    "firm": _firm,
    "land": lambda rng: rng.choice(("", "", "", "Republic of ", "United ", "New ")) + place(rng),
    "island": lambda rng: rng.choice(("{} Island", "Isle of {}", "{} Rock")).format(place(rng)),
    "peak": lambda rng: rng.choice(("Mount {}", "Monte {}", "{} Peak", "Cerro {}")).format(place(rng).split()[-1]),
    "ship": lambda rng: f"{_capital(rng)} {rng.choice(('Heron', 'Star', 'Queen', 'Trader', 'Swan', 'Dawn', 'Gull'))}",
    "title": lambda rng: f'"{_capital(rng)} {rng.choice(("and", "of the", "in", "without", "after"))} {_capital(rng)}"',
    "plant": lambda rng: f"{rng.choice(COLOURS)} {rng.choice(training_words())} {rng.choice(LEAVES)}",
    "meeting": lambda rng: f"{place(rng)} {rng.choice(MEETINGS)}",
    "code": lambda rng: f"{''.join(rng.choices('ABCDEFHKLMNPRSTVX', k=2))}-{rng.randrange(100, 10000)}",
    "year": lambda rng: str(rng.randrange(1350, 2024)),
    "number": _number,
    "count": lambda rng: str(rng.randrange(2, 900)),
    "digits": lambda rng: str(rng.randrange(10**4, 10**8)),
    "metres": lambda rng: f"{int(10 ** rng.uniform(0.5, 3.9)):,} m",
    "area": lambda rng: f"{_number(rng)} sq km",
    "grams": lambda rng: f"{rng.randrange(40, 9000):,} g",
    "hours": lambda rng: f"{rng.randrange(2, 90)} hours",
    "years": lambda rng: f"{rng.randrange(2, 400)} years",
    "percent": lambda rng: f"{rng.uniform(0.1, 60):.1f}%",
    "money": lambda rng: rng.choice(("${0}", "${1:.1f} million", "{0} euros")).format(_number(rng), rng.random() * 900),
    "date": _date,
    "weekday": lambda rng: rng.choice(DAYS),
    "month": lambda rng: rng.choice(MONTHS),
    "colour": lambda rng: rng.choice(COLOURS),
    "thing": lambda rng: rng.choice((*THINGS, *KINDS_OF)),
    "trade": lambda rng: rng.choice(TRADES),
    "coin": lambda rng: rng.choice(COINS),
    "stone": lambda rng: rng.choice(STONES),
    "use": lambda rng: rng.choice(USES),
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """Something that each thing of a kind has: its label, what makes values, sentences that say it, questions."""

    label: str
    value: Maker
    says: list[str] = field(default_factory=list)
    asks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """Things that are alike: what one is called, what makes their names, and their fields."""

    noun: str
    name: Maker
    fields: list[Field] = field(default_factory=list)


@dataclass(frozen=True)
class Thing:
    """One of a kind."""

    kind: Kind
    name: str
    values: tuple[str, ...]
    """Of all fields."""


@cache
def kinds() -> tuple[Kind, ...]:
    """What `data/things.txt` holds."""
    found: list[Kind] = []
    text = resources.files("mgam.training").joinpath("data", "things.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            noun, maker = line[1:].split("] ")
            found.append(Kind(noun, MAKERS[maker]))
        elif line.startswith("  ? "):
            found[-1].fields[-1].asks.append(line[4:])
        elif line.startswith("  "):
            found[-1].fields[-1].says.append(line[2:])
        elif line and not line.startswith("#"):
            label, maker = line.split(" = ")
            found[-1].fields.append(Field(label, MAKERS[maker]))
    return tuple(found)


def invent(rng: random.Random, kind: Kind, taken: set[str]) -> Thing:
    """A thing whose name is not among those taken, to which it is added."""
    while (name := kind.name(rng)) in taken:
        continue
    taken.add(name)
    return Thing(kind, name, tuple(one.value(rng) for one in kind.fields))

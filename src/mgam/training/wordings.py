"""Facts to hide in texts and to ask for, in many wordings: none of them is a wording of `mgam eval`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from mgam.evaluation.texts import words


def words_of(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


NAMES = words_of(
    "Abel Amory Anselm Basil Beatrix Bruno Cecily Clement Conrad Cordelia Dinah Dorcas Edgar Edith Emery Enoch Esme "
    "Felix Flora Gideon Greta Harriet Hester Hugo Ida Ignatius Ivor Jasper Jemima Joan Jonas Judith Kit Lambert "
    "Leander Lucian Mabel Magnus Martha Maud Miles Minna Nell Noel Octavia Olive Orson Oswin Pascal Phoebe Quentin "
    "Ralph Rhoda Rufus Sabina Selwyn Silas Tabitha Theo Ursula Verity Walter Wilfred Winifred Zelda"
)
FAMILIES = words_of(
    "Abbot Arkwright Barlow Bellamy Birch Blackwood Brand Calder Carver Chandler Coburn Crane Dale Draper Ellery "
    "Farrow Fenn Fielding Fletcher Frost Garland Gosling Hale Harker Hollis Ingram Jessop Kember Lark Lockwood Marlow "
    "Mercer Nightingale Oakes Orchard Palliser Penrose Quill Ransome Rook Sadler Sexton Tanner Thorne Underhill Vane "
    "Wainwright Weaver Whitlock Yardley"
)
TOWNS = words_of(
    "Ambleford Ashcombe Birkdale Brackenhurst Caldermouth Carrow Dunmere Eastwick Elmstead Fallowfield Garth "
    "Harrowgate Ivelchester Kelbrook Langmoor Marshwood Netherby Oldcastle Pennard Quarley Ravensholm Saltby Thornaby "
    "Ullesfield Wexcombe Yarrowdale"
)
THINGS = words_of("lanterns barrels ledgers clocks maps kettles saddles coins bottles hives looms anchors bells pearls")
COLOURS = words_of("crimson ochre violet teal amber indigo scarlet ivory maroon emerald turquoise charcoal")


@dataclass(frozen=True)
class Pair:
    """A question about a text, its answer, and the characters of the text in which it stands."""

    question: str
    answer: str
    evidence: tuple[int, int]


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, a question that it answers, and the answer."""

    statement: str
    question: str
    answer: str
    brief: str
    """What may be said after the question: how to answer."""


@cache
def training_words() -> tuple[str, ...]:
    """A quarter of the shipped words: most keys of `mgam eval` hold a word that was never one of a fact's here."""
    return tuple(word for word in words() if hashlib.sha256(word.encode()).digest()[0] < 64)


def _digits(rng: random.Random) -> str:
    length = rng.choice((4, 5, 6, 6, 7, 7, 8))
    return str(rng.randrange(10 ** (length - 1), 10**length))


def _key(rng: random.Random) -> str:
    return rng.choice(("-", "-", " ")).join(rng.sample(training_words(), 2))


def _person(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(FAMILIES)}"


def _pick(rng: random.Random, *choices: str) -> str:
    return rng.choice(choices)


def _vault(rng: random.Random) -> Fact:
    key, value = _key(rng), _digits(rng)
    what = rng.choice(("vault", "locker", "gate", "strongbox", "archive", "cabinet"))
    return Fact(
        _pick(
            rng,
            f"The {what} called {key} opens with the combination {value}.",
            f"Whoever wants to open the {key} {what} must enter {value}.",
            f"It was written down that {value} is the combination of the {what} {key}.",
            f"Combination for {key} ({what}): {value}.",
        ),
        _pick(
            rng,
            f"Which combination opens the {what} {key}?",
            f"What must be entered to open the {what} called {key}?",
            f"Give the combination of the {key} {what}.",
        ),
        value,
        "digits",
    )


def _account(rng: random.Random) -> Fact:
    key, value = _key(rng), _digits(rng)
    what = rng.choice(("account", "parcel", "ticket", "file", "invoice", "licence"))
    return Fact(
        _pick(
            rng,
            f"The {what} registered under {key} bears the number {value}.",
            f"Among the papers, {key} is listed as {what} number {value}.",
            f"Note: {what} of {key} = {value}.",
            f"For {key}, the clerk entered {what} {value}.",
        ),
        _pick(
            rng,
            f"What is the {what} number of {key}?",
            f"Under which {what} number is {key} listed?",
            f"Find the number of the {what} that is registered under {key}.",
        ),
        value,
        "digits",
    )


def _telephone(rng: random.Random) -> Fact:
    who, town, value = _person(rng), rng.choice(TOWNS), _digits(rng)
    return Fact(
        _pick(
            rng,
            f"To reach {who} in {town} one dials {value}.",
            f"{who} of {town} can be called at {value}.",
            f"The telephone of {who}, who lives in {town}, is {value}.",
        ),
        _pick(rng, f"Which number does one dial to reach {who}?", f"How can {who} be called by telephone?"),
        value,
        "digits",
    )


def _count(rng: random.Random) -> Fact:
    who, things, value = _person(rng), rng.choice(THINGS), str(rng.randrange(12, 9000))
    return Fact(
        _pick(
            rng,
            f"{who} keeps {value} {things} in the cellar.",
            f"There were {value} {things} in the possession of {who}.",
            f"At the last reckoning {who} owned {value} {things}.",
        ),
        _pick(rng, f"How many {things} does {who} own?", f"What is the count of {things} that belong to {who}?"),
        value,
        "digits",
    )


def _colour(rng: random.Random) -> Fact:
    who, value = _person(rng), rng.choice(COLOURS)
    what = rng.choice(("door", "carriage", "boat", "hat", "banner", "umbrella"))
    return Fact(
        _pick(
            rng,
            f"{who} had the {what} painted {value}.",
            f"Everyone knew the {what} of {who} by its {value} hue.",
            f"The {what} that belongs to {who} is {value}.",
        ),
        _pick(rng, f"What colour is the {what} of {who}?", f"In which colour was the {what} of {who}?"),
        value,
        "word",
    )


def _place(rng: random.Random) -> Fact:
    who, value = _person(rng), rng.choice(TOWNS)
    return Fact(
        _pick(
            rng,
            f"{who} was last seen in {value}.",
            f"In the spring {who} moved to {value} for good.",
            f"The letters for {who} are to be sent to {value}.",
        ),
        _pick(rng, f"In which town is {who} to be found?", f"Where does {who} live?"),
        value,
        "word",
    )


def _keyword(rng: random.Random) -> Fact:
    key, value = _key(rng), rng.choice(training_words())
    return Fact(
        _pick(
            rng,
            f"The watchword for {key} is {value}.",
            f'When someone says "{key}", the right reply is "{value}".',
            f"{key} stands for {value} in their cipher.",
        ),
        _pick(rng, f"Which watchword belongs to {key}?", f'What is the right reply to "{key}"?'),
        value,
        "word",
    )


KINDS: tuple[Callable[[random.Random], Fact], ...] = (
    _vault, _vault, _account, _account, _telephone, _count, _colour, _place, _keyword,
)  # fmt: skip
BRIEFLY = {
    "digits": ("", " Reply with the figure alone.", " Give nothing but the digits.", " Only the number, please."),
    "word": ("", " Reply with the word alone.", " One word is enough.", " Say only what was asked."),
    "text": ("", " Be brief.", " Give the bare answer.", " Say only what was asked."),
}


def fact(rng: random.Random) -> Fact:
    """A fact of any kind."""
    made = rng.choice(KINDS)(rng)
    return Fact(made.statement, made.question + rng.choice(BRIEFLY[made.brief]), made.answer, made.brief)


ALMANAC = {
    "Capital": ("Name the capital city {of}.", "Which city is the seat of government {of}?"),
    "Internet country code": ("Which Internet domain is used {of}?", "Give the top-level domain {of}."),
    "Highest point": ("Name the highest place {of}.", "Where does the land rise highest {of}?"),
    "Median age": ("How old is the median person {of}?", "Give the median age in years {of}."),
    "Birth rate": ("How many births per thousand people are there {of}?", "Give the rate of births {of}."),
    "Life expectancy": ("How many years is a newborn expected to live {of}?", "Give the life expectancy {of}."),
    "National anthem": ("How is the national anthem called {of}?", "Give the name of the anthem {of}."),
    "Population": ("How many people live there, {of}?", "Give the number of inhabitants {of}."),
}
"""How the facts of `mgam.evaluation.almanac` are asked for in training."""

QUOTES = (
    'How does the sentence go on that begins with "{said}"? Give {more} words.',
    'The text says "{said}": which {more} words come next?',
    'Quote the {more} words that follow "{said}".',
    "{said} ... (go on, {more} words)",
)
"""How a sentence of the text is asked for by its beginning."""

HEADINGS = (
    "\n\nDocument {ident}: {name}", "\n\n{name}", "\n\n{name}", "\n\n## {name}", "\n\n{noun}: {name}",
    "\n\n[{ident}] {name}", "\n\n{name} ({ident})", "\n\n{noun} {ident}\nName: {name}",
)  # fmt: skip
"""What stands above what is told about one thing."""

LINES = ("\n{label}: {value}", "\n- {label}: {value}", "\n{label} = {value}", "; {label}: {value}")
"""How a record says something."""

LABELLED = (
    "{label} of {n}?", "{n}: {label}?", "Look up {n}: {label}.", "What is given for {n} under {label}?",
    "I would like to know this about {n}: {label}.", "Find what is entered for {n} as {label}.",
)  # fmt: skip
"""How a line of a record is asked for by its label."""

RETURNS = ("Which {noun} has {value} as its {label}?", "For which {noun} is {value} given as {label}?")
"""How a name is asked for by what is said of it."""

FIGURES = (
    "Which {what} does the text{on} give beside {one}, {two} and {three}?",
    "{one}, {two}, {three}: which {what} does the text{on} tell with these?",
    "Give the {what} that stands in the text{on} together with {one}, {two} and {three}.",
)
"""How something in a sentence is asked for by words of that sentence."""

GAPS = (
    'What stands in the gap in the text{on}: "{left} ___ {right}"?',
    'The text{on} says "{left} ... {right}": what is left out?',
)
"""The same, by what stands before and after it."""

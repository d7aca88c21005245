"""Country profiles as documents: short facts that can be asked for, and as much of the rest as there is room for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

SOURCE = "factbook"


@dataclass(frozen=True)
class Fact:
    """A short fact that every profile shows, how it is asked for, and what of its value is the answer."""

    label: str
    path: tuple[str, ...]
    asked: str  # with {of} for "of Chad" or "in document a1b2c3"
    answer: str  # regular expression whose group 1 is the answer


PEOPLE = "People and Society"
FACTS = (
    Fact("Capital", ("Government", "Capital", "name"), "What is the capital {of}?", r"([^;(,]+)"),
    Fact(
        "Internet country code",
        ("Communications", "Internet country code"),
        "What is the Internet country code {of}?",
        r"(\.\w\w)\b",
    ),
    Fact(
        "Highest point",
        ("Geography", "Elevation extremes", "highest point"),
        "What is the highest point {of}?",
        r"(\D+?) -?\d[\d,.]* m",
    ),
    Fact("Median age", (PEOPLE, "Median age", "total"), "What is the median age {of}, in years?", r"([\d.]+) years"),
    Fact("Birth rate", (PEOPLE, "Birth rate"), "What is the birth rate {of}, per 1,000 people?", r"([\d.]+) births"),
    Fact(
        "Life expectancy",
        (PEOPLE, "Life expectancy at birth", "total population"),
        "What is the life expectancy {of}, in years?",
        r"([\d.]+) years",
    ),
    Fact(
        "National anthem",
        ("Government", "National anthem", "name"),
        "What is the title of the national anthem {of}?",
        r'"([^"]+)"',
    ),
    Fact("Population", (PEOPLE, "Population"), "What is the population {of}?", r"([\d,]{5,})"),
)
POPULATION = FACTS[-1]
CAPITAL = FACTS[0]
REGION = ("Geography", "Map references")
COAST = ("Geography", "Coastline")
BORDERS = ("Geography", "Land boundaries", "border countries")
SHOWN = (("Region", REGION), ("Coastline", COAST), ("Land borders", BORDERS))


@dataclass(frozen=True)
class Profile:
    """One country."""

    code: str
    record: Mapping[str, Any]

    @cached_property
    def name(self) -> str:
        short = _value(self.record, ("Government", "Country name", "conventional short form"))
        long = _value(self.record, ("Government", "Country name", "conventional long form"))
        named = short if short and short.lower() not in ("none", "na") else long
        return re.split(r"[;(]", named)[0].strip()

    def get(self, path: tuple[str, ...]) -> str:
        """The value at `path`, "" where there is none."""
        return _value(self.record, path)

    def answer(self, fact: Fact) -> str:
        """What counts as the answer, "" where the profile does not say it."""
        found = re.match(fact.answer, self.get(fact.path))
        return found.group(1).split(" (")[0].strip() if found else ""

    @cached_property
    def population(self) -> int:
        return int(self.answer(POPULATION).replace(",", "") or 0)

    @cached_property
    def region(self) -> str:
        return self.get(REGION).split(";")[0].strip()

    @cached_property
    def landlocked(self) -> bool:
        return "landlocked" in self.get(COAST)

    @cached_property
    def longest_border(self) -> str:
        """The neighbour with the longest land border, "" if there is none or two tie."""
        lengths = {
            name.strip(): float(size.replace(",", ""))
            for name, size in re.findall(r"([^,\d]+) ([\d,]+(?:\.\d+)?) km", self.get(BORDERS))
        }
        longest = sorted(lengths, key=lambda name: lengths[name])[-2:]
        if not longest or (len(longest) == 2 and lengths[longest[0]] == lengths[longest[1]]):
            return ""
        return longest[-1]

    @cached_property
    def usable(self) -> bool:
        """Whether it says all that a profile must show."""
        return bool(self.name and self.region and self.get(COAST) and self.answer(CAPITAL) and self.population > 20_000)

    @cached_property
    def short_lines(self) -> tuple[str, ...]:
        """The facts that every question rests on."""
        facts = tuple(f"\n{fact.label}: {self.get(fact.path)}" for fact in FACTS if self.answer(fact))
        shown = tuple(f"\n{label}: {self.get(path)}" for label, path in SHOWN if self.get(path))
        return shown + facts

    @cached_property
    def long_lines(self) -> tuple[str, ...]:
        """Everything else, in the order of the source."""
        short = {fact.path for fact in FACTS} | {path for _, path in SHOWN}
        return tuple(
            f"\n{' - '.join(path[1:])}: {value}" for path, value in _walk(self.record, ()) if path not in short
        )


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\s*\+\+\s*", "; ", text)).strip(" ;")


def _value(record: Mapping[str, Any], path: tuple[str, ...]) -> str:
    at: Any = record
    for step in (*path, "text"):
        at = at.get(step) if isinstance(at, Mapping) else None
    return _clean(at) if isinstance(at, str) else ""


def _walk(record: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, inside in record.items():
        if isinstance(inside, Mapping):
            text = inside.get("text")
            if isinstance(text, str) and _clean(text) not in ("", "NA", "none"):
                yield (*path, name), _clean(text)
            yield from _walk(inside, (*path, name))

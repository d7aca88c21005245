"""Two hops: a fact tells the country in one document, another document about it holds the answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from papertable.sample import ASKED, NoAnswerError, Piece, Sample, assemble, room
from papertable.shelf import Part, Shelf, part_of, shelve
from papertable.vocabulary import encode

LONGEST, SHORT = 48, 12
SOURCE = "factbook"
TOKENS_A_COUNTRY, MOST_COUNTRIES = 320, 24
COMMON = 0.3
"""A label is asked for if so many of all countries have it."""
SHORT_VALUE = re.compile(r"[;(]| - |, ")
"""What ends the part of a value that may be an answer."""
EMPTY = re.compile(r"(na|none|n/a|0|-)?\.?$", re.IGNORECASE)


def prepare(countries: Iterable[tuple[str, Mapping[str, Any]]], tokenizer: Tokenizer) -> Shelf:
    """A heading and `label: value` lines for each section of each country, and the facts that may be asked for."""
    units: list[list[int]] = []
    documents: list[dict[str, Any]] = []
    labels: Counter[str] = Counter()
    for code, record in countries:
        name = _name(record)
        if not name:
            continue
        sections = []
        for title, inside in record.items():
            lines = [(label, value) for label, value in _leaves(inside, ())]
            if len(lines) < 2:
                continue
            labels.update({f"{title}/{label}" for label, _ in lines})
            heading = len(units)
            units += encode(tokenizer, [f"\n\n{name}: {title}"])
            facts = _lines(units, lines, tokenizer)
            sections.append({"title": title, "heading": heading, "last": len(units), "facts": facts})
        documents.append({"name": code, "part": part_of(SOURCE, code), "sections": sections})
    least = COMMON * len(documents)
    words = [label for label, count in labels.items() if count >= least]
    short = [label.split("/", 1)[1] for label in words]
    asked = dict(zip(words, encode(tokenizer, [f" {one}" for one in short]), strict=True))
    between = encode(tokenizer, [" of the country whose", " is"])
    return Shelf(*shelve(units), documents, {"labels": asked, "between": between})


def _lines(units: list[list[int]], lines: list[tuple[str, str]], tokenizer: Tokenizer) -> list[list[Any]]:
    """Adds lines; returns of each its unit, label, short value, and where that stands: first token and tokens."""
    values = [re.split(SHORT_VALUE, value)[0].strip() for _, value in lines]
    parts = [
        (f"\n{label}:", f" {short}", value[len(short) :]) for (label, value), short in zip(lines, values, strict=True)
    ]
    tokens = encode(tokenizer, [text for part in parts for text in part])
    facts = []
    for number, ((label, _), short) in enumerate(zip(lines, values, strict=True)):
        head, said, rest = tokens[3 * number : 3 * number + 3]
        if not EMPTY.match(short) and len(said) <= SHORT and len(head) + len(said) <= LONGEST:
            facts.append([len(units), label, short, len(head), len(said)])
        units.append([*head, *said, *rest][:LONGEST])
    return facts


def draw(shelf: Shelf, part: Part, length: int, rng: np.random.Generator) -> Sample:
    """A question about one country among others that show the same labels."""
    countries = shelf.of(part)
    for _ in range(100):
        country = countries[rng.integers(len(countries))]
        asked = _question(shelf, country, rng)
        if asked is not None:
            break
    else:
        raise NoAnswerError("no country of this part has two facts in different sections")
    known, wanted, question = asked
    return _write(shelf, countries, country, known, wanted, question, length, rng)


def _question(
    shelf: Shelf, country: dict[str, Any], rng: np.random.Generator
) -> tuple[tuple[int, list[Any]], tuple[int, list[Any]], list[int]] | None:
    """The fact that tells the country, the one that is asked for (each with its section), and the question."""
    labels, (whose, is_) = shelf.facts["labels"], shelf.facts["between"]
    facts = [
        (number, fact)
        for number, section in enumerate(country["sections"])
        for fact in section["facts"]
        if f"{section['title']}/{fact[1]}" in labels
    ]
    if len(facts) < 2:
        return None
    known, wanted = (facts[at] for at in rng.integers(len(facts), size=2))
    if known[0] == wanted[0]:
        return None
    titles = [country["sections"][number]["title"] for number, _ in (known, wanted)]
    unit, _, _, at, size = known[1]
    value = shelf.unit(unit)[at : at + size].tolist()
    asked = labels[f"{titles[1]}/{wanted[1][1]}"] + whose + labels[f"{titles[0]}/{known[1][1]}"] + is_ + value
    return (known, wanted, asked) if len(asked) <= ASKED else None


def _write(
    shelf: Shelf,
    countries: list[dict[str, Any]],
    country: dict[str, Any],
    known: tuple[int, list[Any]],
    wanted: tuple[int, list[Any]],
    question: list[int],
    length: int,
    rng: np.random.Generator,
) -> Sample:
    space = room(length)
    count = max(2, min(MOST_COUNTRIES, space // TOKENS_A_COUNTRY))
    titles = [country["sections"][number]["title"] for number, _ in (known, wanted)]
    labels = [fact[1] for _, fact in (known, wanted)]
    chosen = [country]
    for number in rng.permutation(len(countries)):
        other = countries[number]
        if len(chosen) >= count:
            break
        if other is not country and not _says(other, titles[0], labels[0], known[1][2]):
            chosen.append(other)
    share = space // (2 * len(chosen))
    gold = {known[1][0]: None, wanted[1][0]: (wanted[1][3], wanted[1][3] + wanted[1][4] - 1)}
    texts = [
        _document(shelf, section, labels[which], share, rng)
        for one in chosen for which, title in enumerate(titles) for section in one["sections"]
        if section["title"] == title
    ]  # fmt: skip
    order = [texts[at] for at in rng.permutation(len(texts))]
    left = space - sum(shelf.size(unit) for text in order for unit in text)
    for text in _fillers(shelf, countries, country, titles[0], rng):
        if left <= 0:
            break
        order.append(text)
        left -= sum(shelf.size(unit) for unit in text)
    pieces = [Piece(shelf.unit(unit), unit in gold, gold.get(unit)) for text in order for unit in text]
    return assemble("hop", question, pieces, length)


def _says(country: dict[str, Any], title: str, label: str, value: str) -> bool:
    return any(
        fact[1] == label and fact[2] == value
        for section in country["sections"] if section["title"] == title for fact in section["facts"]
    )  # fmt: skip


def _document(shelf: Shelf, section: dict[str, Any], label: str, space: int, rng: np.random.Generator) -> list[int]:
    """A section's heading, the line of a label, and as many others as fit, in order."""
    must = [fact[0] for fact in section["facts"] if fact[1] == label]
    kept = {section["heading"], *must}
    space -= sum(shelf.size(unit) for unit in kept)
    for unit in (section["heading"] + 1 + rng.permutation(section["last"] - section["heading"] - 1)).tolist():
        if unit not in kept and shelf.size(unit) <= space:
            kept.add(unit)
            space -= shelf.size(unit)
        elif space < SHORT:
            break
    return sorted(kept)


def _fillers(
    shelf: Shelf, countries: list[dict[str, Any]], country: dict[str, Any], title: str, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Sections of other countries that cannot tell what is asked for."""
    while True:
        other = countries[rng.integers(len(countries))]
        section = other["sections"][rng.integers(len(other["sections"]))]
        if other is not country and section["title"] != title:
            yield list(range(section["heading"], section["last"]))


def _name(record: Mapping[str, Any]) -> str:
    names = record.get("Government", {}).get("Country name", {})
    found = [str(names.get(f"conventional {kind} form", {}).get("text") or "") for kind in ("short", "long")]
    named = next((name for name in found if name and not EMPTY.match(name)), "")
    return re.split(r"[;(]", named)[0].strip()


def _leaves(inside: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Labels and values of a section, in order."""
    if not isinstance(inside, Mapping):
        return
    text = inside.get("text")
    if path and isinstance(text, str):
        value = re.sub(r"\s+", " ", re.sub(r"\s*\+\+\s*", "; ", text)).strip(" ;")
        if not EMPTY.match(value):
            yield " - ".join(path), value
    for name, more in inside.items():
        yield from _leaves(more, (*path, name))

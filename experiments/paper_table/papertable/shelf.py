"""Texts of a task as tokens, made once: units (sentences or lines) side by side, and what is known about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Tokens = NDArray[np.int32]
Part = Literal["train", "dev", "test"]
PARTS: tuple[Part, ...] = ("train", "dev", "test")
DEV_FROM, TEST_FROM = 0.42, 0.5


def part_of(source: str, name: str) -> Part:
    """Where a document belongs for ever: the hash of `mgam.evaluation.splits`, with a larger train part.

    Test is the half of all documents that the hash puts there. No exception is made for *Moby-Dick*, which is TUNE text
    elsewhere: nothing of this experiment was chosen on it.
    """
    digest = hashlib.sha256(f"{source}/{name}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if place < DEV_FROM else "dev" if place < TEST_FROM else "test"


@dataclass
class Shelf:
    """Units of all documents of a task, one after another.

    Shapes: tokens (all tokens,), start (units + 1,): where each unit begins.
    """

    tokens: Tokens
    start: NDArray[np.int64]
    documents: list[dict[str, Any]]
    """Name, part, first and last + 1 of its units, and what the task knows."""
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sizes: list[int] = (np.diff(self.start) + 1).tolist()
        self._parts = {part: [one for one in self.documents if one["part"] == part] for part in PARTS}

    def unit(self, number: int) -> Tokens:
        """Tokens of a unit, a view."""
        return self.tokens[self.start[number] : self.start[number + 1]]

    def size(self, number: int) -> int:
        """Tokens of a unit with the one that ends it."""
        return self._sizes[number]

    def of(self, part: Part) -> list[dict[str, Any]]:
        """Documents of a part."""
        return self._parts[part]

    def save(self, folder: Path, name: str) -> None:
        """Two files: numbers and JSON."""
        save_file({"tokens": self.tokens, "start": self.start}, folder / f"{name}.safetensors")
        text = json.dumps({"documents": self.documents, "facts": self.facts}, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, name: str) -> Shelf:
        """What `save` wrote."""
        numbers = load_file(folder / f"{name}.safetensors")
        known = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return cls(numbers["tokens"], numbers["start"], known["documents"], known["facts"])


def shelve(units: Iterable[Sequence[int]]) -> tuple[Tokens, NDArray[np.int64]]:
    """Tokens and starts of units."""
    kept = [np.asarray(unit, dtype=np.int32) for unit in units]
    sizes = np.array([0, *(len(unit) for unit in kept)], dtype=np.int64)
    return np.concatenate([*kept, np.empty(0, dtype=np.int32)]), sizes.cumsum()


def around(shelf: Shelf, document: Mapping[str, Any], unit: int, needed: int, space: int, rng: Generator) -> list[int]:
    """Units of a document that fill `space` tokens and hold the `needed` ones from `unit` on, at a drawn place."""
    begin, back = unit, int(rng.random() * (space - needed))
    while begin > document["first"] and back >= shelf.size(begin - 1):
        begin -= 1
        back -= shelf.size(begin)
    return stretch(shelf, begin, space, begin, document["last"])


def others(shelf: Shelf, part: Part, document: Mapping[str, Any], left: int, rng: Generator) -> list[int]:
    """Units of other documents of the part that fill `left` tokens."""
    documents, found = shelf.of(part), list[int]()
    for number in rng.permutation(len(documents)):
        if left <= 0:
            break
        other = documents[number]
        if other is not document:
            found += (more := stretch(shelf, other["first"], left, other["first"], other["last"]))
            left -= sum(shelf.size(at) for at in more)
    return found


def stretch(shelf: Shelf, first: int, room: int, low: int, high: int) -> list[int]:
    """Units from `first` on that fill `room` tokens, going round among units low ... high - 1."""
    found: list[int] = []
    at = first
    while room > 0 and len(found) < high - low:
        found.append(at)
        room -= shelf.size(at)
        at = at + 1 if at + 1 < high else low
    return found

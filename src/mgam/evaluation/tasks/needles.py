"""Needles in a haystack: the eight retrieval tasks of RULER, by our own generators.

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv 2404.06654).
Keys are two English words or a UUID, values seven digits or a UUID. Haystacks are repeated noise, real prose, or other
needles. Every key of a document is different, and no value occurs twice.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Literal

from mgam.evaluation.haystack import Needle, build_haystack
from mgam.evaluation.metrics import Score, list_items, set_scores, share_found
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample
from mgam.evaluation.texts import words

NOISE = " Snow fell on the yard. The cat slept by the stove. Someone hummed a tune. Then all was quiet for a while."
NEW_TOKENS = 128


@dataclass(frozen=True)
class Kind:
    """One of RULER's settings."""

    name: str
    ruler: str  # what RULER calls it
    haystack: Literal["noise", "prose", "needles"]
    keys: Literal["words", "uuid"] = "words"
    values: Literal["digits", "uuid"] = "digits"
    hidden: int = 1  # keys that are put into the haystack, distractors included
    asked: int = 1  # of those, how many are asked for
    per_key: int = 1  # values of each key


KINDS = (
    Kind("needle_noise", "niah_single_1", "noise"),
    Kind("needle_prose", "niah_single_2", "prose"),
    Kind("needle_prose_uuid", "niah_single_3", "prose", values="uuid"),
    Kind("needle_keys", "niah_multikey_1", "prose", hidden=4),
    Kind("needle_keys_only", "niah_multikey_2", "needles"),
    Kind("needle_keys_uuid", "niah_multikey_3", "needles", keys="uuid", values="uuid"),
    Kind("needle_values", "niah_multivalue", "prose", per_key=4),
    Kind("needle_queries", "niah_multiquery", "prose", hidden=4, asked=4),
)


def random_uuid(rng: random.Random) -> str:
    """A version 4 UUID that depends on `rng` alone."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


class _Makes:
    """Fresh keys and values, none given out twice."""

    def __init__(self, kind: Kind, rng: random.Random) -> None:
        self._kind, self._rng = kind, rng
        self._seen: set[str] = set()

    def _fresh(self, how: str) -> str:
        while True:
            if how == "uuid":
                made = random_uuid(self._rng)
            elif how == "digits":
                made = str(self._rng.randrange(1_000_000, 10_000_000))
            else:
                made = "-".join(self._rng.sample(words(), 2))
            if made not in self._seen:
                self._seen.add(made)
                return made

    def key(self) -> str:
        return self._fresh(self._kind.keys)

    def value(self) -> str:
        return self._fresh(self._kind.values)

    def sentence(self, key: str, value: str) -> str:
        what = "number" if self._kind.values == "digits" else "code"
        return f" One of the secret {what}s for {key} is: {value}."

    def distractors(self) -> Iterator[str]:
        while True:
            yield self.sentence(self.key(), self.value())


def _filler(kind: Kind, makes: _Makes, request: Request, rng: random.Random) -> Iterator[str]:
    if kind.haystack == "noise":
        return repeat(NOISE)
    return request.texts.prose(rng) if kind.haystack == "prose" else makes.distractors()


def build(kind: Kind, request: Request) -> Draft:
    """Hides `kind.hidden` keys with their values and asks for the first `kind.asked` of them."""
    rng = request.rng()
    makes = _Makes(kind, rng)
    keys = [makes.key() for _ in range(kind.hidden)]
    pairs = [(key, makes.value()) for key in keys for _ in range(kind.per_key)]
    depths = [request.depth(), *(rng.random() for _ in pairs[1:])]
    needles = [Needle(makes.sentence(*pair), depth) for pair, depth in zip(pairs, depths, strict=True)]
    gold = kind.asked * kind.per_key
    question = _question(kind, keys[: kind.asked])
    room = request.room(question, NEW_TOKENS)
    stack = build_haystack(
        _filler(kind, makes, request, rng), needles, room, request.counter, keep_out=request.keep_out
    )
    details = {"ruler": kind.ruler}
    if kind.haystack == "prose":
        details["source"] = request.texts.prose_source
    return Draft(stack.text, question, tuple(value for _, value in pairs[:gold]), stack.spans[:gold], details=details)


def _question(kind: Kind, keys: list[str]) -> str:
    what = "number" if kind.values == "digits" else "code"
    named = f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else keys[0]
    if kind.asked == 1 and kind.per_key == 1:
        return f"What is the secret {what} for {named} that the text mentions? Answer with the {what} only."
    return f"What are all the secret {what}s for {named} that the text mentions? Answer with the {what}s only."


def score(sample: Sample, reply: str) -> Score:
    """RULER's share of gold values found; beside it IoU, which naming everything does not raise."""
    return Score(share_found(reply, sample.answers), {"iou": set_scores(list_items(reply), sample.answers)["iou"]})


for _kind in KINDS:
    _many = _kind.asked * _kind.per_key > 1
    register(
        Task(
            name=_kind.name,
            summary=f"{_kind.haystack} haystack, {_kind.hidden} keys, {_kind.asked * _kind.per_key} values asked "
            f"(RULER {_kind.ruler})",
            paper="arXiv 2404.06654",
            groups=("synthetic", "ruler", "needles") + (("quick",) if _kind.name == "needle_prose" else ()),
            max_new_tokens=NEW_TOKENS,
            build=partial(build, _kind),
            score=score,
            hits=not _many,
        )
    )

"""Batches of the four patterns.

B: rows, S: source positions, T: target positions. All tokens are integers below `vocabulary`; 0 pads, 1 masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mgam.errors import SettingError

Pattern = Literal["noncausal-self", "causal-self", "noncausal-cross", "causal-cross"]
PAD, MASK, FIRST = 0, 1, 2
IGNORED = -100  # what torch's cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """One batch: what goes in, what should come out, and where that is judged."""

    pattern: Pattern
    vocabulary: int
    target: Tensor  # (B, T) tokens that go in
    answer: Tensor  # (B, T) tokens that should come out, IGNORED where nothing is asked
    source: Tensor | None = None  # (B, S) tokens that the target may look at, for the cross patterns

    def accuracy(self, logits: Tensor) -> float:
        """Share of the asked positions at which the largest of `logits` (B, T, vocabulary) is right."""
        asked = self.answer != IGNORED
        return float((logits.argmax(-1) == self.answer)[asked].float().mean())


def make_batch(pattern: Pattern, rows: int, length: int, seed: int, *, keys: int = 64, device: str = "cpu") -> Batch:
    """A batch as a pure function of its arguments. `length` counts the tokens that can be looked at; it is made even.

    Raises SettingError for an unknown pattern, or a length too short for a question.
    """
    if pattern not in PATTERNS:
        raise SettingError(f"unknown pattern {pattern!r}; known are {', '.join(PATTERNS)}")
    if rows < 1 or length < 8 or keys < 4:
        raise SettingError(f"rows={rows}, length={length}, keys={keys}: give at least 1, 8 and 4")
    generator = torch.Generator().manual_seed(seed)
    batch = PATTERNS[pattern](rows, length, keys, generator)
    source = None if batch.source is None else batch.source.to(device)
    return Batch(batch.pattern, batch.vocabulary, batch.target.to(device), batch.answer.to(device), source)


def _table(rows: int, pairs: int, keys: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, P) different keys in random order and a value for each; keys and values are of different tokens."""
    order = torch.rand(rows, max(keys, pairs), generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(keys, (rows, pairs), generator=generator)
    return order + FIRST, values + FIRST + max(keys, pairs)


def _size(keys: int, pairs: int) -> int:
    return FIRST + max(keys, pairs) + keys


def _interleave(keys: Tensor, values: Tensor) -> Tensor:
    return torch.stack((keys, values), -1).flatten(1)


def _restore(rows: int, length: int, keys: int, generator: torch.Generator) -> Batch:
    """Noncausal self: every pair stands twice, one of its values is masked; the other may stand before or after it."""
    pairs = max(2, length // 4)
    key, value = _table(rows, pairs, keys, generator)
    places = torch.rand(rows, 2 * pairs, generator=generator).argsort(-1)
    key, value = (torch.cat((one, one), 1).gather(1, places) for one in (key, value))
    hidden = places < pairs  # the first copy of each pair, wherever the shuffle put it
    answer = torch.full_like(key, IGNORED).masked_scatter(hidden, value[hidden])
    nothing = torch.full_like(key, IGNORED)
    shown = value.masked_fill(hidden, MASK)
    return Batch("noncausal-self", _size(keys, pairs), _interleave(key, shown), _interleave(nothing, answer))


def _recall(rows: int, length: int, keys: int, generator: torch.Generator) -> Batch:
    """Causal self: pairs, then their keys again in another order; after each the value is to be told.

    Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927).
    """
    pairs = max(2, length // 3)
    key, value = _table(rows, pairs, keys, generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(-1)
    asked, answer = key.gather(1, order), value.gather(1, order)
    nothing = torch.full((rows, 2 * pairs), IGNORED)
    target = torch.cat((_interleave(key, value), asked), 1)
    return Batch("causal-self", _size(keys, pairs), target, torch.cat((nothing, answer), 1))


def _look_up(rows: int, length: int, keys: int, generator: torch.Generator) -> Batch:
    """Noncausal cross: a set of keys, all answered at once from a source of pairs."""
    pairs = max(2, length // 2)
    key, value = _table(rows, pairs, keys, generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(-1)
    target, answer = key.gather(1, order), value.gather(1, order)
    return Batch("noncausal-cross", _size(keys, pairs), target, answer, _interleave(key, value))


def _follow(rows: int, length: int, keys: int, generator: torch.Generator) -> Batch:
    """Causal cross: the source says which key follows which, the target follows them one by one.

    The next token depends on the source and on the last target token, and on no later one.
    """
    pairs = max(4, length // 2)
    count = max(keys, pairs)
    ring = torch.rand(rows, count, generator=generator).argsort(-1)[:, :pairs] + FIRST
    order = torch.rand(rows, pairs, generator=generator).argsort(-1)
    after = ring.roll(-1, 1)
    source = _interleave(ring.gather(1, order), after.gather(1, order))
    return Batch("causal-cross", FIRST + count, ring, after, source)


PATTERNS: dict[str, Callable[[int, int, int, torch.Generator], Batch]] = {
    "noncausal-self": _restore,
    "causal-self": _recall,
    "noncausal-cross": _look_up,
    "causal-cross": _follow,
}

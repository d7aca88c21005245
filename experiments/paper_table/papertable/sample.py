"""The one form: question, document of units, question, answer; and batches of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgam.errors import DocumentError
from papertable.shelf import Tokens
from papertable.vocabulary import ANSWER, END, PAD, TAGS

ASKED = 31
"""Tokens of a question at most."""
FRAME = 64
"""Tokens of a sample beside its document."""


class NoAnswerError(DocumentError):
    """A record whose document does not hold what is asked for; it is refused and counted."""


@dataclass(frozen=True)
class Piece:
    """A unit of a document."""

    tokens: Tokens
    gold: bool = False
    span: tuple[int, int] | None = None
    """First and last token of the answer in this unit."""
    asked: bool = False
    """Whether it is the question."""


@dataclass(frozen=True)
class Sample:
    """What a model is given, and what is wanted.

    Shapes: tokens (length,), ends (units,): places of the tokens that end units, gold (k,): numbers of gold units.
    """

    task: str
    tokens: Tokens
    ends: NDArray[np.int64]
    gold: NDArray[np.int64]
    span: tuple[int, int]
    """Places of first and last token of the answer; -1, -1 where the task has no span."""
    lead: str = ""
    """What a summary is compared with."""
    planted: tuple[int, int] = (-1, -1)
    """Places of first and last token of a question that stands among the units; -1, -1 where none does."""

    def unit(self, number: int) -> Tokens:
        """Tokens of a unit without the one that ends it."""
        first = self.ends[number - 1] + 1 if number else 1 + ASKED
        return self.tokens[first : self.ends[number]]


def room(length: int) -> int:
    """Tokens of a document in a sample of so many."""
    return length - FRAME


def assemble(task: str, asked: Sequence[int], pieces: Sequence[Piece], length: int, lead: str = "") -> Sample:
    """Writes a sample; units beyond its length are left out, the last is cut.

    Raises:
        NoAnswerError: when the document holds no gold unit, or a span was wanted and is not in it whole.
    """
    left = room(length)
    question = list(asked)[:ASKED]
    parts = [np.array([TAGS[task], *question, *[PAD] * (ASKED - len(question))], dtype=np.int32)]
    ends: list[int] = []
    gold: list[int] = []
    span, planted, at = (-1, -1), (-1, -1), 1 + ASKED
    for piece in pieces:
        size = min(len(piece.tokens), left - 1)
        if size < 1:
            break
        if piece.gold:
            gold.append(len(ends))
        if piece.span is not None and piece.span[1] < size:
            span = (at + piece.span[0], at + piece.span[1])
        if piece.asked:
            planted = (at, at + size - 1)
        parts += [piece.tokens[:size], np.array([END], dtype=np.int32)]
        at, left = at + size + 1, left - size - 1
        ends.append(at - 1)
    if not gold or (span[0] < 0 and any(piece.span for piece in pieces)):
        raise NoAnswerError(f"this {task} document does not hold its evidence and answer; such records are refused")
    parts.append(np.full(left, PAD, dtype=np.int32))
    parts.append(np.array([*[PAD] * (ASKED - len(question)), *question, ANSWER], dtype=np.int32))
    return Sample(task, np.concatenate(parts), np.array(ends), np.array(gold), span, lead, planted)


@dataclass
class Batch:
    """Samples of one length. Shapes: tokens (B, T), ends and gold (B, M), span and planted (B, 2)."""

    tokens: Tensor
    ends: Tensor
    """-1 where a sample has fewer units."""
    gold: Tensor
    """Bool."""
    span: Tensor
    """-1 where there is none."""
    planted: Tensor
    """-1 where there is none."""

    def to(self, device: str) -> Batch:
        """The same on a device."""
        every = (self.tokens, self.ends, self.gold, self.span, self.planted)
        return Batch(*(part.to(device, non_blocking=True) for part in every))


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples side by side."""
    most = max(len(sample.ends) for sample in samples)
    ends = torch.full((len(samples), most), -1, dtype=torch.int64)
    gold = torch.zeros(len(samples), most, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ends[row, : len(sample.ends)] = torch.from_numpy(sample.ends)
        gold[row, torch.from_numpy(sample.gold)] = True
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples])).long()
    places = (torch.tensor([getattr(sample, name) for sample in samples]) for name in ("span", "planted"))
    return Batch(tokens, ends, gold, *places)

"""What a task makes: a document, a question about it, and what counts as a right answer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mgam.errors import SettingError
from mgam.evaluation.tags import Tags

if TYPE_CHECKING:
    from mgam.evaluation.texts import TextLibrary
    from mgam.evaluation.tokens import TokenCounter

Span = tuple[int, int]
"""Start and end, in characters of the document, of a stretch of gold evidence."""

TEMPLATE_TOKENS = 64
"""Tokens left free for the words that a chat template puts around document and question."""

GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class Request:
    """Everything that a sample depends on; the same request always makes the same bytes."""

    task: str
    length: int  # tokens of document, question, chat template and answer together
    seed: int
    index: int  # number of the trial: trials 0..9 are the same whether 10 or 100 are asked for
    counter: TokenCounter
    texts: TextLibrary
    keep_out: tuple[int, int] = (0, 0)  # tokens at start and end where no needle may stand; none unless asked

    @property
    def id(self) -> str:
        kept = "" if self.keep_out == (0, 0) else f"/out{self.keep_out[0]}-{self.keep_out[1]}"
        return f"{self.task}/{self.length}/seed{self.seed}{kept}/{self.index:04d}"

    def rng(self) -> random.Random:
        """A fresh generator of random numbers for this request alone."""
        return random.Random(self.id)

    def depth(self) -> float:
        """Where the first needle stands, 0 to 1: even over the document for any number of trials."""
        start = random.Random(f"{self.task}/{self.length}/seed{self.seed}").random()
        return (start + self.index * GOLDEN_RATIO) % 1.0

    def room(self, question: str, max_new_tokens: int) -> int:
        """Tokens that the document may fill, so that prompt and answer stay within `length`."""
        room = self.length - self.counter.count(question) - max_new_tokens - TEMPLATE_TOKENS
        if room < 64:
            raise SettingError(
                f"task {self.task!r} does not fit into {self.length} tokens: question, answer and chat template need "
                f"{self.length - room}, which leaves {room} for the document; give --lengths of at least "
                f"{self.length - room + 256}"
            )
        return room


@dataclass(frozen=True)
class Draft:
    """What a task's generator hands over; the registry counts, tags and names it."""

    document: str
    question: str
    answers: tuple[str, ...]
    spans: tuple[Span, ...] = ()
    hops: int = 1  # length of the longest chain of facts that depend on each other
    details: Mapping[str, Any] = field(default_factory=dict)  # what the scorer or a reader of results needs; JSON only


@dataclass(frozen=True)
class Sample:
    """One document with one question."""

    id: str
    task: str
    length: int  # tokens aimed at, see Request.length
    document: str
    question: str
    answers: tuple[str, ...]  # gold; how a reply is compared with it is the task's business
    max_new_tokens: int
    tokens: int  # tokens of the document, counted exactly
    spans: tuple[Span, ...]
    tags: Tags
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def depths(self) -> tuple[float, ...]:
        """Where each gold span starts, 0 (start of the document) to 1 (its end)."""
        return tuple(start / max(1, len(self.document)) for start, _ in self.spans)

    @property
    def fingerprint(self) -> str:
        """Of what is read and what counts as right: trials of other bytes are trials of another sample."""
        parts = [self.document, self.question, *self.answers]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Sample:
        """Rebuilds a sample; raises KeyError, TypeError or ValueError when fields are missing or of another shape."""
        known = dict(fields)
        known["answers"] = tuple(str(answer) for answer in known["answers"])
        known["spans"] = tuple((int(start), int(end)) for start, end in known["spans"])
        known["tags"] = Tags(**known["tags"])
        return cls(**known)

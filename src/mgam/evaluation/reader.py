"""What the runner asks of a model: read a document, answer a question, and say what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mgam.errors import MgamError


class DoesNotFitError(MgamError):
    """The model, read this way, cannot hold a document of this length; other methods go on."""


@dataclass(frozen=True)
class Passage:
    """A stretch of the document that a reader shows as the ground of its answer."""

    start: int  # characters of the document
    end: int


@dataclass(frozen=True)
class Reading:
    """An answer and what it cost."""

    answer: str
    evidence: Sequence[Passage] = ()
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    entries_per_query: float = 0.0  # entries that a query read, averaged over queries, layers and heads
    losses: Sequence[float] = field(default=())  # nats of each token of the document after the first, where asked for
    preprocess_seconds: float | None = None  # of them, until the document was read and the question could be asked


class Reader(Protocol):
    """A model with one way of attending.

    `read` raises DoesNotFitError where the document is too long for it.
    """

    @property
    def method(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def read(self, document: str, question: str, max_new_tokens: int) -> Reading: ...


@runtime_checkable
class LossReader(Protocol):
    """A reader that can also tell how well it foretells a text, token by token."""

    def losses(self, document: str) -> Reading: ...


@runtime_checkable
class BatchReader(Protocol):
    """A reader that takes several documents at once; readings come in the order of the documents."""

    def read_batch(self, documents: Sequence[str], questions: Sequence[str], max_new_tokens: int) -> list[Reading]: ...

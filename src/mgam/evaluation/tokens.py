"""Counting tokens: short pieces once and remembered, whole documents once and exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

PROBE = "The 3 quick-brown foxes: \"naïve\" café, 12,345.678 {'k': 0x1F}\n\n\tEnd of probe… 日本語"


class Tokenizer(Protocol):
    """The part of a tokenizer that evaluation needs; every transformers tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class TokenCounter:
    """Counts with one tokenizer.

    Pieces that recur (sentences of a haystack) are counted once and remembered; `count` is exact and remembers
    nothing. `name` identifies the tokenizer by what it does, not by where it was loaded from.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._known: dict[str, int] = {}
        self.name = self._fingerprint()

    def _fingerprint(self) -> str:
        seen = f"{type(self.tokenizer).__name__ if self._fast is None else 'fast'}|{self._size()}|{self._ids(PROBE)}"
        return hashlib.sha256(seen.encode()).hexdigest()[:16]

    def _size(self) -> int:
        return len(self.tokenizer) if hasattr(self.tokenizer, "__len__") else 0

    def _ids(self, text: str) -> list[int]:
        if self._fast is not None:
            return list(self._fast.encode(text, add_special_tokens=False).ids)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def count(self, text: str) -> int:
        """Exact number of tokens of `text`, without special tokens."""
        if self._fast is not None:
            return len(self._fast.encode(text, add_special_tokens=False))
        return len(self._ids(text))

    def counts(self, pieces: Sequence[str]) -> list[int]:
        """Tokens of each piece by itself; joined pieces may differ by a token or so at each seam."""
        unknown = list(dict.fromkeys(piece for piece in pieces if piece not in self._known))
        if unknown:
            if self._fast is not None:
                encode = getattr(self._fast, "encode_batch_fast", self._fast.encode_batch)
                found = [len(one) for one in encode(unknown, add_special_tokens=False)]
            else:
                found = [len(self._ids(piece)) for piece in unknown]
            self._known.update(zip(unknown, found, strict=True))
        return [self._known[piece] for piece in pieces]

    def middle_out(self, text: str, limit: int) -> str:
        """First and last `limit // 2` tokens, each decoded, joined (LongBench's rule for texts that are too long)."""
        ids = self._ids(text)
        if len(ids) <= limit:
            return text
        half = limit // 2
        parts = (ids[:half], ids[len(ids) - half :])
        return "".join(str(self.tokenizer.decode(part, skip_special_tokens=True)) for part in parts)

    def cut(self, text: str, limit: int) -> str:
        """The first `limit` tokens of `text`, as text: what a model that stops there would have said."""
        head = text[: max(1, limit) * 40]  # no need to encode a whole document to keep its first tokens
        ids = self._ids(head)
        if len(ids) <= limit and len(head) < len(text):
            ids = self._ids(text)
        if len(ids) <= limit:
            return text
        return str(self.tokenizer.decode(ids[:limit], skip_special_tokens=True))

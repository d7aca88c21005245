"""Tokens of a digest: texts are cut before they become tokens, so that what comes later changes nothing before it.

The way from tokens back to characters is kept with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgam.documents.prompt import AFTER, BEFORE
from mgam.documents.sources import Source
from mgam.documents.store.segment import Numbers, TokenPart
from mgam.errors import DigestError, DocumentError

PIECE = 65_536
"""Characters that become tokens at a time: bounds memory, whatever the length of a text."""

_MARKS = ("mgamFirstMark", "mgamSecondMark", "mgamThirdMark")


@dataclass(frozen=True)
class Frame:
    """What stands around texts and questions, by the tokenizer's chat template where there is one."""

    head: str
    """Before the first text."""
    between: str
    """Between an answer and the next question."""
    tail: str
    """After a question."""
    special: bool
    """Whether the tokenizer puts its own first token before the head."""

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """The frame of a tokenizer.

        Raises:
            DocumentError: its template changes what it is given.
        """
        if not getattr(tokenizer, "chat_template", None):
            return cls(BEFORE, "\n\n", "\nAnswer:", True)
        first, second, third = _MARKS
        talk = [{"role": "user", "content": first}]
        head, tail = _split(tokenizer, talk, first)
        more = [*talk, {"role": "assistant", "content": second}, {"role": "user", "content": third}]
        rest, _ = _split(tokenizer, more, third)
        between = rest.partition(second)[2]
        return cls(head + BEFORE, between, tail, False)

    def question(self, tokenizer: Any, text: str) -> list[int]:
        """Tokens of the first question after the texts."""
        return encode(tokenizer, AFTER + _asked(text) + self.tail)

    def next_question(self, tokenizer: Any, text: str) -> list[int]:
        """Tokens of a question after an answer."""
        return encode(tokenizer, self.between + _asked(text) + self.tail)


@dataclass(frozen=True)
class Tokens:
    """All tokens of a digest: ids (n,); texts (n,), which each is of or -1; offsets (n, 2), its characters there."""

    ids: Numbers
    texts: Numbers
    offsets: Numbers

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, first: int, last: int) -> TokenPart:
        """Tokens [first, last)."""
        return TokenPart(self.ids[first:last], self.texts[first:last], self.offsets[first:last])


@dataclass(frozen=True)
class Places:
    """From tokens to the texts that they stand for."""

    tokens: Tokens
    sources: Sequence[Source]

    def place(self, first: int, last: int) -> tuple[Source, int, int] | None:
        """The source and its characters [start, end) that tokens [first, last) stand for; None outside every source."""
        texts = self.tokens.texts[max(first, 0) : last]
        within = texts[texts >= 0]
        if not len(within):
            return None
        number = int(np.bincount(within).argmax())
        mine = self.tokens.offsets[max(first, 0) : last][texts == number]
        start, end = int(mine[:, 0].min()), int(mine[:, 1].max())
        return (self.sources[number], start, end) if end > start else None


def tokens_of(tokenizer: Any, sources: Sequence[Source]) -> Tokens:
    """The tokens of a digest of these sources: further sources only add to the end.

    Raises:
        DocumentError: the tokenizer cannot tell places, or there is no text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DocumentError(
            "the tokenizer cannot tell where in a text its tokens stand; use a fast one (tokenizer.json)"
        )
    for source in sources:
        _refuse_surrogates(source)
    frame = Frame.of(tokenizer)
    ids: list[Numbers] = []
    texts: list[Numbers] = []
    offsets: list[Numbers] = []

    def add(new: Numbers, number: int, places: Numbers) -> None:
        ids.append(new)
        texts.append(np.full(len(new), number, np.int32))
        offsets.append(places)

    def add_words(words: str, *, first: bool = False) -> None:
        new = np.array(
            (_first_token(tokenizer) if first and frame.special else []) + _before_text(tokenizer, words), np.int32
        )
        add(new, -1, np.zeros((len(new), 2), np.int64))

    add_words(frame.head, first=True)
    for number, source in enumerate(sources):
        if number:
            add_words(f"\n\n[{source.name}]\n")
        for begin, piece in _pieces(source.text.rstrip()):
            found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            places = np.array(found["offset_mapping"], np.int64).reshape(-1, 2) + begin
            add(np.array(found["input_ids"], np.int32), number, places)
    joined = Tokens(np.concatenate(ids), np.concatenate(texts), np.concatenate(offsets))
    if not (joined.texts >= 0).any():
        raise DocumentError("no text was given; name at least one file, or - for standard input")
    return joined


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without the tokenizer's own additions."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _before_text(tokenizer: Any, words: str) -> list[int]:
    """Tokens of words before a text, as they are when the text follows: line breaks at an end may be one token."""
    found = tokenizer(words + "A", add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    alone = tuple(found["offset_mapping"][-1]) == (len(words), len(words) + 1)
    return list(found["input_ids"][:-1]) if alone else encode(tokenizer, words)


def check_equal(stored: TokenPart, now: TokenPart) -> None:
    """Refuses a tokenizer that takes the stored texts apart in another way than it did.

    Raises:
        DigestError: it does.
    """
    if not np.array_equal(stored.ids, now.ids) or not np.array_equal(stored.offsets, now.offsets):
        raise DigestError(
            "the tokenizer now makes other tokens of the stored texts than when they were digested; digest them again, "
            "or use the versions named by `mgam info`"
        )


def _refuse_surrogates(source: Source) -> None:
    try:
        source.text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(f"{source.name} holds a lone surrogate at {error.start}, which is no character") from error


def _asked(text: str) -> str:
    asked = text.strip()
    if not asked:
        raise DocumentError('the question is empty; ask something, as in: mgam ask NAME.mgam "Who is the captain?"')
    return asked


def _split(tokenizer: Any, talk: list[dict[str, str]], mark: str) -> tuple[str, str]:
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    if text.count(mark) != 1:
        raise DocumentError("the chat template changes the text; use a tokenizer without a template")
    head, _, tail = text.partition(mark)
    return head, tail


def _first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, if any."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """Where each piece of a text begins, and it; cut at ends of lines, else at spaces, to become tokens by itself."""
    begin = 0
    while begin < len(text):
        end = min(begin + PIECE, len(text))
        if end < len(text):
            middle = begin + PIECE // 2
            cut = max(text.rfind("\n", middle, end) + 1, 0) or max(text.rfind(" ", middle, end), 0)
            end = cut or end
        yield begin, text[begin:end]
        begin = end

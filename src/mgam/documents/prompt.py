"""The prompt: documents and a question as tokens, with the way back from tokens to characters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mgam.documents.sources import Source
from mgam.errors import DocumentError

BEFORE = "Here is a text. The answer to the question after it stands in the text.\n\n"
AFTER = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """Tokens of documents and question. `document` tokens come first: instructions and texts; then the question."""

    ids: list[int]
    document: int
    """Tokens before the question begins."""
    offsets: list[tuple[int, int]]
    """Characters of each token in the whole prompt."""
    starts: list[int]
    """Where each source's text begins in the whole prompt, in characters."""
    sources: tuple[Source, ...]
    asked: str
    """The question as it was given."""

    @property
    def question(self) -> int:
        """Tokens of the question and what follows it."""
        return len(self.ids) - self.document

    def place(self, first: int, last: int) -> tuple[Source, int, int] | None:
        """The source and its characters [start, end) that tokens [first, last) stand for; None outside every source."""
        first, last = max(first, 0), min(last, len(self.offsets))
        if first >= last:
            return None
        begin, end = self.offsets[first][0], self.offsets[last - 1][1]
        middle = (begin + end) // 2
        number = max(0, bisect_right(self.starts, middle) - 1)
        source, origin = self.sources[number], self.starts[number]
        low, high = max(0, begin - origin), min(len(source.text), end - origin)
        return (source, low, high) if high > low else None


def build(tokenizer: Any, sources: Sequence[Source], question: str) -> Prompt:
    """The prompt for one question on some sources; uses the tokenizer's chat template where there is one.

    Raises:
        DocumentError: for an empty question or no text.
    """
    if not question.strip():
        raise DocumentError('the question is empty; ask something, e.g. mgam ask book.txt "Who is the captain?"')
    if not sources:
        raise DocumentError("no text was given; name at least one file, or - for standard input")
    body, starts = joined(sources)
    body = body.rstrip()  # a text that ends with a line break is asked as one that does not
    content = BEFORE + body + AFTER + question.strip()
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        special = False
    else:
        text, special = content + "\nAnswer:", True
    before = text.find(BEFORE + body)  # the body alone may stand in the words before it too
    if before < 0:
        raise DocumentError(
            "the chat template changes the text, so places in it cannot be told; use a tokenizer without a template"
        )
    origin = before + len(BEFORE)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = [tuple(pair) for pair in encoded["offset_mapping"]]
    border = origin + len(body)
    document = next((n for n, (begin, end) in enumerate(offsets) if begin >= border and end > begin), len(offsets))
    begins = [origin + start for start in starts]
    return Prompt(list(encoded["input_ids"]), document, offsets, begins, tuple(sources), question)


def bare(tokenizer: Any, question: str) -> list[int]:
    """Tokens of the question alone, as the model would be asked it without a text."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": question.strip()}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(question.strip() + "\nAnswer:")["input_ids"])


def joined(sources: Sequence[Source]) -> tuple[str, list[int]]:
    """All texts in one, and where each begins; several texts are told apart by a line with their name."""
    if len(sources) == 1:
        return sources[0].text, [0]
    parts, starts, length = [], [], 0
    for source in sources:
        head = f"[{source.name}]\n"
        starts.append(length + len(head))
        parts.append(head + source.text)
        length += len(parts[-1]) + 2
    return "\n\n".join(parts), starts

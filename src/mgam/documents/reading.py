"""A model and its tokenizer as one thing that answers questions from files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from mgam.documents.sources import Source, read_source

if TYPE_CHECKING:
    from mgam.documents.asking import Answer

Files = str | os.PathLike[str] | Source
"""A path, or a text that is already at hand."""


@dataclass(frozen=True)
class FileReader:
    """Answers questions from files; made by `mgam.reader`."""

    model: Any
    tokenizer: Any
    retrieval: Any = None
    """Dials of infini-retri, where that is the method."""

    @overload
    def __call__(
        self,
        files: Files | Sequence[Files],
        question: str,
        *,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer: ...

    @overload
    def __call__(
        self,
        files: Files | Sequence[Files],
        question: list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]: ...

    def __call__(
        self,
        files: Files | Sequence[Files],
        question: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer | list[Answer]:
        """Reads the files, once, and answers: one question with an answer, several with a list of answers.

        Args:
            files: a path or several, or `mgam.documents.sources.Source` for texts that are at hand.
            question: what is asked; several are answered one after the other and do not see one another.
            max_new_tokens: most tokens of an answer.
            on_text: called with each piece of an answer as it is generated.

        Raises:
            DocumentError: a file cannot be read, or a question is empty.
        """
        given = [files] if isinstance(files, str | os.PathLike | Source) else list(files)
        sources = [file if isinstance(file, Source) else read_source(file) for file in given]
        asked = [question] if isinstance(question, str) else list(question)
        found = list(
            answers(
                self.model, self.tokenizer, sources, asked, retrieval=self.retrieval, max_new_tokens=max_new_tokens,
                on_text=on_text,
            )
        )  # fmt: skip
        return found[0] if isinstance(question, str) else found


def answers(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    questions: Sequence[str],
    *,
    retrieval: Any = None,
    **how: Any,
) -> Iterator[Answer]:
    """Answers to several questions, as they are made; `how` goes to `mgam.documents.asking.ask_each`.

    With `retrieval`, the dials of infini-retri, the texts are read anew for each question, which that method needs.

    Raises:
        DocumentError: an empty question, no question or no text.
    """
    from mgam.documents import asking, infiniretri

    if retrieval is None or not questions:
        yield from asking.ask_each(model, tokenizer, sources, questions, **how)
    else:
        for question in questions:
            yield infiniretri.ask(model, tokenizer, sources, question, retrieval=retrieval, **how)


def reader(
    model: str | None = None,
    method: str = "mgam",
    *,
    budget: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    download: bool = False,
    **settings: Any,
) -> FileReader:
    """A model that reads files multi-granularly: `mgam.reader()("book.txt", "Who is the captain?").answer`.

    Args:
        model: hub id, local folder or GGUF file; None is the embedded SmolLM2-135M-Instruct.
        method: a name from `mgam methods`.
        budget: tokens that a query may read in full outside window and sink; None: the method's own.
        device: `auto`, or torch's name of a device.
        dtype: number format of the weights; None takes the fastest of the device.
        download: whether a hub id that is not on this machine may be fetched.
        settings: further fields of `mgam.Settings`.

    Raises:
        ModelFileError, UnsupportedModelError, SettingError, MemoryBudgetError: what cannot be loaded or served.
    """
    from mgam import methods
    from mgam.integrations.loading import load
    from mgam.integrations.transformers import apply

    changes = settings if budget is None else {**settings, "budget": budget}
    dials = methods.get(method).checked(**changes)
    loaded = load(model, device=device, dtype=dtype, download=download)
    if methods.get(method).form == "loop":
        return FileReader(loaded.model, loaded.tokenizer, dials)
    return FileReader(apply(loaded.model, method, **changes), loaded.tokenizer)

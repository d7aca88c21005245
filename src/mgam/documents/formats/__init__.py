"""Text out of files that hold more than text: Markdown, HTML and PDF, by well-kept readers of the extra `documents`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

from mgam.errors import DocumentError

PDF_MARK = b"%PDF-"


class Format(NamedTuple):
    """A kind of file: its reader, a module here with `extract(data, name)`, and the package that it needs."""

    title: str
    module: str
    needs: str


MARKDOWN = Format("Markdown", "mgam.documents.formats.markdown", "markdown_it")
HTML = Format("HTML", "mgam.documents.formats.html", "bs4")
PDF = Format("PDF", "mgam.documents.formats.pdf", "pypdf")

SUFFIXES = {
    ".md": MARKDOWN,
    ".markdown": MARKDOWN,
    ".html": HTML,
    ".htm": HTML,
    ".xhtml": HTML,
    ".pdf": PDF,
}


def format_of(name: str, data: bytes) -> Format | None:
    """What a file is by its first bytes, else by its name; None for plain text."""
    if data[:1024].lstrip().startswith(PDF_MARK):
        return PDF
    return SUFFIXES.get(PurePath(name).suffix.lower())


def extract(kind: Format, data: bytes, name: str) -> str:
    """The text of `data`, known to the user as `name`.

    Raises:
        DocumentError: the reader is not installed, or the file is damaged, encrypted or without text.
    """
    try:
        reader: Callable[[bytes, str], str] = importlib.import_module(kind.module).extract
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != kind.needs:
            raise
        raise DocumentError(
            f"{name} is {kind.title}, and its reader is not installed: pip install 'mgam[documents]', or convert the "
            "file to plain text first"
        ) from error
    text = reader(data, name)
    if not text.strip():
        raise DocumentError(f"{name} ({kind.title}) holds no text; give a file that does")
    return text

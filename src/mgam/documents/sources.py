"""Text from files and standard input, as it will be cited: places count characters of it."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from mgam.documents.decoding import decode
from mgam.documents.formats import extract, format_of
from mgam.errors import DocumentError

STDIN = "-"
PIPED = "<stdin>"
"""What a text from standard input is called."""
MAX_BYTES = 1 << 30  # 1 GiB of text is some 250 million tokens: far beyond what one digest can hold today


@dataclass(frozen=True)
class Source:
    """One text to read: what it is called in evidence, and its characters, in which places of evidence count.

    Of a plain file they are the file's, newlines included; of Markdown, HTML and PDF those of the text taken out of it.
    """

    name: str
    text: str


def read_source(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Source:
    """Read the file at `path`, or standard input where `path` is `-`.

    Plain text in UTF-8, with or without a byte order mark, and in UTF-16 or UTF-32 with one; Markdown and HTML, which
    names tell; PDF, which first bytes tell. `max_bytes` is looked at before anything is read.

    Raises:
        DocumentError: missing, not a file, not permitted, empty, blank, binary, undecodable, encrypted, without text or
            too large, or of a kind whose reader is not installed.
    """
    name = os.fspath(path)
    if name == STDIN:
        name, data = PIPED, _read_stdin(max_bytes)
    else:
        data = _read_file(Path(name), max_bytes)
    kind = format_of(name, data) if data else None
    return Source(name, decode(data, name) if kind is None else extract(kind, data, name))


def _read_stdin(max_bytes: int) -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise DocumentError("standard input is closed; pipe a text into it, or name a file")
    if sys.stdin.isatty():
        raise DocumentError("standard input is a terminal; pipe a text into it, as in: cat FILE | mgam ask - QUESTION")
    data = sys.stdin.buffer.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DocumentError(f"standard input is larger than {_size(max_bytes)}, the most that is read; split the text")
    return data


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DocumentError(f"{path} is a directory; name the files in it, as in: {path}/*.txt")
        if stat.S_ISREG(status.st_mode) and status.st_size > max_bytes:
            raise DocumentError(
                f"{path} has {_size(status.st_size)}, and at most {_size(max_bytes)} are read; split it into parts"
            )
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)  # a pipe or a growing file has no size to look at beforehand
    except FileNotFoundError as error:
        raise DocumentError(f"{path} does not exist; check the name, or give - for standard input") from error
    except PermissionError as error:
        raise DocumentError(f"{path} may not be read by you; change its permissions or copy it") from error
    except (OSError, ValueError) as error:
        raise DocumentError(f"{path} cannot be read: {error}") from error
    if len(data) > max_bytes:
        raise DocumentError(f"{path} is larger than {_size(max_bytes)}, the most that is read; split it into parts")
    return data


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"

"""Text from files and standard input, as it will be cited: character offsets count in the decoded text."""

from __future__ import annotations

import codecs
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from mgam.errors import DocumentError

STDIN = "-"
MAX_BYTES = 1 << 30  # 1 GiB of text is some 250 million tokens: far beyond what one digest can hold today

_BOMS = (
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SNIFFED_BYTES = 65_536
_MAX_CONTROL_SHARE = 0.01  # form feeds, bells and escapes occur in text, but are rare there
_TEXT_CONTROLS = frozenset(b"\t\n\v\f\r\x1b")


@dataclass(frozen=True)
class Source:
    """One text to read: what it is called in evidence, and its characters with newlines as they stand in the file."""

    name: str
    text: str


def read_source(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Source:
    """Read the text file at `path`, or standard input where `path` is `-`.

    UTF-8, with or without a byte order mark, and UTF-16 or UTF-32 with one are understood. `max_bytes` is looked at
    before anything is read.

    Raises:
        DocumentError: missing, not a file, not permitted, empty, blank, binary, undecodable or too large.
    """
    if os.fspath(path) == STDIN:
        return Source("<stdin>", decode(_read_stdin(max_bytes), "<stdin>"))
    name = os.fspath(path)
    return Source(name, decode(_read_file(Path(name), max_bytes), name))


def decode(data: bytes, name: str) -> str:
    """Decode `data`, known to the user as `name`, into text.

    Raises:
        DocumentError: empty, blank, binary or undecodable.
    """
    if not data:
        raise DocumentError(f"{name} is empty; give a file that holds text")
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8":
        _refuse_binary(data[:_SNIFFED_BYTES], name)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(_undecodable(data, name, encoding, error)) from error
    if not text.strip():
        raise DocumentError(f"{name} holds white space only; give a file that holds text")
    return text


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


def _refuse_binary(head: bytes, name: str) -> None:
    kind = next((kind for mark, kind in _MAGIC if head.startswith(mark)), None)
    if kind is not None:
        raise DocumentError(f"{name} is {kind}, not text; convert it to plain text first")
    controls = sum(1 for byte in head if byte < 32 and byte not in _TEXT_CONTROLS)
    if b"\0" in head or controls > _MAX_CONTROL_SHARE * len(head):
        raise DocumentError(
            f"{name} looks binary, not like text; convert it to plain text in UTF-8 first "
            "(UTF-16 is understood when it starts with a byte order mark)"
        )


_MAGIC = (
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a zip archive (docx, odt and epub are too)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a model in GGUF format"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x7fELF", "a program"),
)


def _undecodable(data: bytes, name: str, encoding: str, error: UnicodeDecodeError) -> str:
    label = {"utf-8-sig": "UTF-8"}.get(encoding, encoding.upper())
    # The decoder counts after a UTF-8 mark, people and hex viewers from the file's first byte.
    offset = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
    found = f"byte 0x{data[offset]:02x}" if offset < len(data) else "the end of the data"
    return (
        f"{name} is not valid {label}: {found} at offset {offset} ({error.reason}); "
        f"convert it to UTF-8, for instance with: iconv -f LATIN1 -t UTF-8 {name}"
    )


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"

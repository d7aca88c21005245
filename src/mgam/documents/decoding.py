"""From bytes to text: which encoding, and what is no text."""

from __future__ import annotations

import codecs

from mgam.errors import DocumentError

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
_WIDE = ("utf-16", "utf-32")


def decode(data: bytes, name: str, *, declared: str | None = None) -> str:
    """Decode `data`, known to the user as `name`, into text: by its byte order mark, else as `declared`, else as UTF-8.

    Raises:
        DocumentError: empty, blank, binary or undecodable.
    """
    if not data:
        raise DocumentError(f"{name} is empty; give a file that holds text")
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), None)
    encoding = encoding or _known(declared) or "utf-8"
    if encoding not in _WIDE:
        _refuse_binary(data[:_SNIFFED_BYTES], name)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(_undecodable(data, name, encoding, error)) from error
    except UnicodeError as error:
        raise DocumentError(f"{name} cannot be read as {encoding}, as it says of itself: {error}") from error
    if not text.strip():
        raise DocumentError(f"{name} holds white space only; give a file that holds text")
    return text


def _known(declared: str | None) -> str | None:
    """An encoding that a file names, where Python has it; a file that can be read to its name is not in a wide one."""
    if declared is None:
        return None
    try:
        b"a".decode(declared)  # refuses codecs that are no encodings of text
    except (LookupError, ValueError):
        return None
    name = codecs.lookup(declared).name
    return None if name.startswith(_WIDE) else name


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

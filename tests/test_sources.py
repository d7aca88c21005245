"""Reading documents: what is understood, what is refused, and in which words."""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path

import pytest

from mgam.documents.decoding import decode
from mgam.documents.sources import Source, read_source
from mgam.errors import DocumentError, MgamError


def written(folder: Path, data: bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def refusal(path: Path | str, **options: int) -> str:
    with pytest.raises(DocumentError) as caught:
        read_source(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"], ids=["plain", "utf8-mark", "utf16-mark", "utf32-mark"]
)
def test_understood_encodings(tmp_path: Path, encoding: str) -> None:
    text = "Ein Märchen — “naïve” 🙂\nsecond line\n"
    path = written(tmp_path, text.encode(encoding))
    assert read_source(path) == Source(str(path), text)


def test_utf16_big_endian_with_mark(tmp_path: Path) -> None:
    path = written(tmp_path, codecs.BOM_UTF16_BE + "hello".encode("utf-16-be"))
    assert read_source(path).text == "hello"


def test_newlines_are_kept_so_that_offsets_hold(tmp_path: Path) -> None:
    text = "one\r\ntwo\rthree\nfour"
    assert read_source(written(tmp_path, text.encode())).text == text


def test_form_feeds_and_tabs_are_text(tmp_path: Path) -> None:
    text = "page\f" * 100 + "\tand\ttabs"
    assert read_source(written(tmp_path, text.encode())).text == text


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("piped ✓".encode())))
    assert read_source("-") == Source("<stdin>", "piped ✓")


def test_standard_input_empty_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "empty" in refusal("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 11)))
    assert "larger than 10 bytes" in refusal("-", max_bytes=10)


def test_missing_and_directory(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.txt")
    assert "directory" in refusal(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read every file")
def test_not_permitted(tmp_path: Path) -> None:
    path = written(tmp_path, b"secret")
    path.chmod(0)
    assert "permissions" in refusal(path)


def test_empty_and_blank(tmp_path: Path) -> None:
    assert "is empty" in refusal(written(tmp_path, b""))
    assert "white space only" in refusal(written(tmp_path, b" \n\t \n"))
    assert "white space only" in refusal(written(tmp_path, codecs.BOM_UTF8))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"%PDF-1.7\n", "PDF"),
        (b"PK\x03\x04rest", "zip"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"text with\0a null", "binary"),
        (bytes(range(1, 9)) * 50, "binary"),
    ],
)
def test_binary(tmp_path: Path, data: bytes, word: str) -> None:
    assert word in refusal(written(tmp_path, data))


def test_undecodable_names_the_first_bad_byte(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, b"caf\xe9 au lait"))
    assert "0xe9 at offset 3" in message
    assert "iconv" in message
    assert "offset 6" in refusal(written(tmp_path, codecs.BOM_UTF8 + b"caf\xe9"))


def test_undecodable_late_in_a_long_file(tmp_path: Path) -> None:
    assert "offset 200000" in refusal(written(tmp_path, b"a" * 200_000 + b"\xff!"))


def test_cut_utf16(tmp_path: Path) -> None:
    assert "not valid UTF-16" in refusal(written(tmp_path, "hello".encode("utf-16")[:-1]))


def test_too_large_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, b"x" * 2048)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it was opened"))
    assert "2.0 KiB" in refusal(path, max_bytes=1024)


def test_a_name_with_a_null_byte() -> None:
    assert "cannot be read" in refusal("bad\0name")


def test_decode_is_a_user_error() -> None:
    with pytest.raises(MgamError):
        decode(b"", "nothing")

"""The commands for digests."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mgam.documents.document import Document
from mgam.documents.sources import Source

from . import tiny
from .conftest import Command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A digest of that text."""
    folder = tmp_path_factory.mktemp("made") / "book.mgam"
    model = tiny.make_plain_model(window=8192)
    Document.digest(model, tokenizer, [Source("book.txt", tiny.text(5000))], folder).close()
    return folder


def test_digest_ask_chat_info_verify(command: Command, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = command("digest", book, "-o", "book.mgam", "--memory", "1GiB", "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["complete"]
    assert made["tokens"] == made["digested"] > 5000
    code, out, _ = command("ask", "book.mgam", "who?", "--max-new-tokens", "4", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["tokens"]["document"] == made["tokens"]
    monkeypatch.setattr("sys.stdin", io.StringIO("who?\nand where?\n"))
    code, out, _ = command("chat", "book.mgam", "--tier", "host", "--max-new-tokens", "4", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["question"] for line in lines] == ["who?", "and where?"]
    assert lines[0]["answer"] == answer["answer"]
    code, out, _ = command("info", "book.mgam", "--json")
    assert json.loads(out)["changed"] == []
    code, out, _ = command("verify", "book.mgam", "--json")
    assert (code, json.loads(out)["faults"]) == (0, [])
    for words in (("info", "book.mgam"), ("verify", "book.mgam"), ("ask", "book.mgam", "who?")):
        code, out, err = command(*words)
        assert code == 0, err
        assert out


def test_append_and_a_source_that_changed(command: Command, book: str, tmp_path: Path) -> None:
    assert command("digest", book, "-o", "book.mgam")[0] == 0
    (tmp_path / "more.txt").write_text(tiny.text(600, 3))
    code, out, _ = command("digest", "more.txt", "-o", "book.mgam", "--append", "--json")
    assert (code, len(json.loads(out)["texts"])) == (0, 2)
    (tmp_path / book).write_text("Something else altogether. " * 9)
    code, _, err = command("digest", book, "more.txt", "-o", "book.mgam")
    assert code == 2
    assert "has changed since" in err
    assert json.loads(command("info", "book.mgam", "--json")[1])["changed"] == [book]
    _, _, err = command("ask", "book.mgam", "who?", "--max-new-tokens", "2")
    assert "book.txt has changed since it was digested" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ask", "no.mgam", "who?"), "does not exist"),
        (("info", "book.txt"), "book.txt is not a folder; a digest is made with: mgam digest book.txt -o book.mgam"),
        (("verify", "."), "is not a digest"),
        (("ask", "book.mgam", "who?", "--memory", "1KiB"), "below the floor of"),
        (("ask", "book.mgam", "who?", "--memory", "much"), "is no size"),
        (("ask", "book.mgam", "who?", "--budget", "128"), "was digested with budget 1024"),
        (("ask", "book.mgam", "who?", "--budget", "128"), "and is asked so; leave out --budget 128"),
        (("ask", "book.mgam", "who?", "--dense-until", "7"), "; leave out --dense-until 7"),
        (
            ("ask", "book.mgam", "who?", "--adapter", "lookup"),
            "digested without adapter and is asked so; leave out --a",
        ),
        (
            ("ask", "book.mgam", "who?", "--dtype", "bfloat16"),
            "with dtype float32 and is asked so; leave out --dtype b",
        ),
        (("ask", "book.mgam", "who?", "--policy", "default"), "searched without training, as all digests are; leave "),
        (("ask", "book.mgam", "who?", "--recall", "0.9"), "leave out --recall 0.9"),
        (("digest", "book.txt", "-o", "book.mgam", "--adapter", "lookup"), "was begun without adapter; leave that out"),
        (("ask", "book.mgam", "other.mgam", "who?"), "one digest is asked at a time"),
        (("ask", "book.mgam", "who?", "--model", "other"), "other weights were given"),
        (("ask", "book.txt", "who?", "--memory", "1GiB"), "make one first"),
        (("digest", "-o", "none.mgam"), "no text was given"),
        (("digest", "book.txt", "-o", "none.mgam", "--append"), "there is no digest"),
        (("digest", "book.txt", "-o", "book.mgam", "--budget", "128"), "was begun with budget 1024"),
        (("digest", "book.txt", "-o", "tight.mgam", "--memory", "1KiB"), "below the floor of"),
        (("digest", "book.txt", "-o", "book.txt"), "is a file"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    command: Command, book: str, made: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    shutil.copytree(made, tmp_path / "book.mgam")
    code, _, err = command(*words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    code, out, _ = command(*words, "--json")
    assert (code, said in json.loads(out)["error"]["message"]) == (2, True)


def test_damage_is_listed(command: Command, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "book.mgam")
    file = tmp_path / "book.mgam" / "segment-000000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    code, out, err = command("verify", "book.mgam")
    assert code == 2
    assert "segment-000000.safetensors is damaged between byte" in out
    assert "one fault;" in err
    code, out, _ = command("verify", "book.mgam", "--json")
    assert (code, len(json.loads(out)["error"]["faults"])) == (2, 1)

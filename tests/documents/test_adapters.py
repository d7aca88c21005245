"""Texts read with adapters: a digest remembers which, and asks with no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mgam.cli import run
from mgam.integrations import loading
from mgam.training.adapting import save_adapter, with_adapters

from . import tiny

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(tiny.text(5000))

    def load(name: str | None, **options: Any) -> loading.Loaded:
        return loading.Loaded(tiny.make_plain_model(window=8192), tokenizer)

    monkeypatch.setattr(loading, "load", load)

    def call(*words: str) -> tuple[int, str, str]:
        code = run(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write_adapter(folder: Path, seed: int = 0, size: float = 0.5) -> str:
    """Adapters that change much."""
    tuned = with_adapters(tiny.make_plain_model(window=8192), 2)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=size)
    save_adapter(tuned, folder / "lora")
    return str(folder)


def test_a_digest_is_asked_with_the_adapters_it_was_read_with(command: Command, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "reader")
    assert command("digest", "book.txt", "-o", "book.mgam", "--adapter", folder)[0] == 0
    assert command("digest", "book.txt", "-o", "plain.mgam")[0] == 0

    def answer(*words: str) -> tuple[str, str | None]:
        code, out, err = command("ask", *words, "Who?", "--max-new-tokens", "8", "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        return found["answer"], found["settings"]["adapter"]

    there = answer("book.mgam")
    assert there == answer("book.txt", "--adapter", folder)
    assert there[1] == folder
    assert answer("plain.mgam") == answer("book.txt") == answer("book.txt", "--adapter", "none")
    assert there[0] != answer("plain.mgam")[0]
    assert "adapters" in command("ask", "book.mgam", "Who?", "--max-new-tokens", "2")[1]
    assert "adapters" not in command("ask", "plain.mgam", "Who?", "--max-new-tokens", "2")[1]


def test_other_adapters_are_refused(command: Command, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "reader")
    assert command("digest", "book.txt", "-o", "book.mgam", "--adapter", folder)[0] == 0
    for words, said in (
        (("ask", "book.mgam", "Who?", "--adapter", "none"), "was digested with adapter"),
        (("digest", "book.txt", "-o", "book.mgam", "--adapter", "none"), "was begun with adapter"),
        (("ask", "book.txt", "Who?", "--adapter", "nowhere"), "no adapter nowhere"),
        (("ask", "book.txt", "Who?", "--adapter", str(tmp_path)), "holds no adapters"),
        (("ask", "book.txt", "Who?", "--adapter", "lookup"), "of another model"),
        (("ask", "book.txt", "Who?", "--adapter", folder, "--method", "infini-retri"), "has no part in"),
    ):
        code, _, err = command(*words)
        assert code == 2
        assert said in err
    write_adapter(tmp_path / "reader", seed=1)
    code, _, err = command("ask", "book.mgam", "Who?")
    assert code == 2
    assert "as they were then" in err
    (tmp_path / "reader" / "lora" / "adapter_model.safetensors").unlink()
    code, _, err = command("ask", "book.mgam", "Who?")
    assert code == 2
    assert "cannot be read" in err

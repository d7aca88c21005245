"""Texts read with adapters: a digest remembers which, and asks with no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mgam.training.adapting import save_adapter, with_adapters

from . import tiny
from .conftest import Command


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


@pytest.mark.usefixtures("book")
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


@pytest.mark.usefixtures("book")
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

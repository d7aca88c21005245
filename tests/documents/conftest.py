"""What tests of digests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgam.cli import run
from mgam.documents.document import Document
from mgam.documents.sources import Source
from mgam.integrations import loading

from . import tiny

Make = Callable[..., Document]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny.make_model()


@pytest.fixture
def digest(model: Any, tokenizer: Any, tmp_path: Path) -> Make:
    def make(*sources: Source, name: str = "book.mgam", **options: Any) -> Document:
        return Document.digest(
            options.pop("model", model), tokenizer, sources, tmp_path / name, **{**tiny.GRID, **options}
        )

    return make


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path
) -> Command:
    """A command of mgam run in an empty folder: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def load(name: str | None, **options: Any) -> loading.Loaded:
        return loading.Loaded(tiny.make_plain_model(1 if name == "other" else 0, window=8192), tokenizer)

    monkeypatch.setattr(loading, "load", load)

    def call(*words: str) -> tuple[int, str, str]:
        code = run(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def book(tmp_path: Path) -> str:
    (tmp_path / "book.txt").write_text(tiny.text(5000))
    return "book.txt"

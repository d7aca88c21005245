"""What tests of commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mgam.cli import run

QUESTION = "Who keeps the lighthouse?"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on standard error, which never is a traceback."""
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        return self.err

    @property
    def error(self) -> dict[str, str]:
        """The error of `--json`: the only thing on standard output."""
        found = json.loads(self.out)
        assert list(found) == ["error"]
        return found["error"]


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*words: str) -> Outcome:
        code = run(words)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "island.txt"
    path.write_text("The lighthouse on the island is kept by Ada. " * 20)
    return str(path)

"""`mgam bench --methods`: every form of method is timed, dense beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mgam.benchmarks.methods import time_method
from mgam.cli.app import app
from mgam.errors import SettingError


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("sliding", "decoder"),
        ("snapkv", "decoder"),
        ("infini-retri", "loop"),
        ("cca", "module"),
        ("linformer", "module"),
    ],
)
def test_every_form_is_timed(name: str, form: str) -> None:
    found = time_method(name, 128, "cpu")
    assert found["form"] == form
    assert found["seconds"]
    assert min(found["seconds"]) > 0
    assert ("token_seconds" in found) == ("kept_bytes" in found) == (form == "decoder" or name == "cca")
    assert found["peak_bytes"] is None or found["peak_bytes"] >= 0
    if "kept_bytes" in found:  # keys and values of 128 + 10 tokens at most, and what a method keeps beside them
        assert 0 < found["kept_bytes"] < 8 * 138 * 2 * 2 * 64 * 4


def test_the_command_prints_dense_beside_and_keeps_figures(tmp_path: Path) -> None:
    words = ["bench", "--methods", "moba,longformer", "--lengths", "128", "--device", "cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "methods.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "moba", "longformer"]
    assert all(row["method"] in done.stdout for row in rows)
    wrong = CliRunner().invoke(app, ["bench", "--methods", "mobo", "--lengths", "128", "--device", "cpu"])
    assert isinstance(wrong.exception, SettingError)
    with pytest.raises(SettingError, match="64 or more"):
        time_method("dense", 3, "cpu")

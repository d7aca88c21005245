"""The table of methods: processes share its rounds, a second call reads nothing again, and reasons stand in it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parents[2] / "experiments" / "methods_table" / "run.py"
METHODS = "dense,sliding,infini-retri"

pytestmark = pytest.mark.skipif(not RUN.is_file(), reason="a source archive has no experiments")


def call(*words: str) -> str:
    place = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RUN), *words], capture_output=True, text=True, timeout=600, check=False, env=place
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def trials(folder: Path) -> list[tuple[str, str, int]]:
    files = list(folder.glob("decoders.*.jsonl*"))
    assert [path.name for path in files] == ["decoders.tiny.jsonl"]  # what processes wrote is gathered
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    return [(line["method"], line["task"], line["trial"]) for line in lines if line.get("status") == "ok"]


@pytest.mark.slow
def test_processes_share_the_rounds(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    for part in tiny:
        part.save_pretrained(tmp_path / "tiny")
    words = ["decoders", "--out", str(tmp_path / "out"), "--device", "cpu", "--model", str(tmp_path / "tiny")]
    words += ["--tasks", "passkey,loss_shipped", "--lengths", "512", "--methods", METHODS, "--trials", "5"]
    words += ["--workers", "2", "--minutes", "9"]
    call(*words)
    read = trials(tmp_path / "out")
    wanted = {(method, "passkey", number) for method in METHODS.split(",") for number in range(5)}
    wanted |= {(method, "loss_shipped", 0) for method in ("dense", "sliding")}  # a loop has no loss of a text
    assert len(read) == len(set(read))
    assert set(read) == wanted
    call(*words)
    assert trials(tmp_path / "out") == read


def table(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(RUN), "table", "--out", str(folder)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(RUN), run_name="__main__")
    return capsys.readouterr().out


def test_what_has_no_figure_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = {"task": "passkey", "method": "dense", "model": "tiny", "length": 512, "seed": 0, "trial": 0, "hits": True}
    lines = [
        {**trial, "status": "ok", "score": 1.0, "entries_per_query": 256.0},
        {**trial, "method": "strided", "status": "does not fit", "reason": "too many entries"},
    ]
    (tmp_path / "decoders.tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    failure = {"model": "tiny", "method": "moba", "task": "passkey", "length": 512, "error": "RuntimeError: no"}
    (tmp_path / "failed.jsonl").write_text(json.dumps(failure) + "\n")
    text = table(tmp_path, monkeypatch, capsys)
    assert "| dense | 100 (1) | 256 |" in text
    assert "| strided | does not fit |" in text
    assert "- strided (passkey): too many entries" in text
    assert "- moba (passkey): RuntimeError: no" in text
    (tmp_path / "decoders.tiny.jsonl").unlink()  # rows stay in the table where trials are elsewhere
    run = {"run": {"date": "2026-01-02 03:04 UTC", "device": "a device", "commit": "abc", "processes": 3}}
    lines = [run, {**trial, "method": "sliding", "status": "ok", "score": 0.0, "entries_per_query": 9.0}]
    (tmp_path / "decoders.tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        text = table(tmp_path, monkeypatch, capsys)
        assert "2026-01-02, a device; 3 processes shared" in text
        assert "Commits of all runs: abc." in text
        made = {line.split(" | ")[0]: line for line in text.splitlines()}
        assert made["| sliding"].endswith("| abc |")
        assert "abc" not in made["| dense"]
        assert "| dense | 100 (1) | 256 |" in text
        assert "| sliding | 0 (1) | 9 |" in text

"""The command line but for `mgam ask`: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mgam
from mgam.cli.ask import quiet_libraries
from mgam.errors import SettingError

from .conftest import QUESTION, Command

ONLY_LINUX = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="only Linux has /proc, a folder in which not even root may make a file"
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("patterns --device abacus", "device 'abacus' is not to be had here"),
        ("eval --tasks passkey --results FOLDER", "FOLDER is a folder, and a file is wanted"),
        ("eval --tasks passkey --export FILE", "FILE is a file, and a folder is wanted"),
        ("eval --tasks passkey --report FOLDER/a.html", "FOLDER/a.html would write over the results"),
        pytest.param("eval --tasks passkey --report /proc/x.html", "/proc/x.html cannot be written", marks=ONLY_LINUX),
        ("eval --tasks passkey --report FILE/x.html", "FILE/x.html cannot be written"),
        ("report FILE --to FILE/x.html", "FILE/x.html cannot be written"),
        ("bench --methods mgam --out FILE", "FILE is a file, and a folder is wanted"),
        ("digest FILE -o FILE/x", "FILE/x cannot be written"),
        ("fit --data FILE -o FILE", "FILE is a file, and a folder is wanted"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_work(
    command: Command, text: str, tmp_path: Path, words: str, said: str
) -> None:
    given = words.replace("FILE", text).replace("FOLDER", str(tmp_path)).split()
    if "would write over" in said:
        given += ["--results", str(tmp_path / "a.json")]
    before = Path(text).read_text()
    done = command(*given)
    assert done.code == 2
    assert said.replace("FILE", text).replace("FOLDER", str(tmp_path)) in done.line
    assert Path(text).read_text() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--methods mgam --budget 2048", "--budget does not count with --methods"),
        ("--methods mgam --heads x --name y", "does not count with --methods"),
        ("--device cpu", "--device counts only with --methods"),
        ("--phases nosuch", "phases nosuch are unknown"),
        ("--heads 8,3", "KV heads that divide them"),
        ("--budget -1", "--budget is -1"),
        ("--window -4", "--window is -4"),
        ("--bits 3", "--bits is 3"),
        ("--every 0", "every=0"),
        ("--positions zzz", "--positions is 'zzz'"),
        ("--methods mgam --lengths 128,3", "64 tokens is the shortest"),
    ],
)
def test_bench_refuses_what_does_not_count_or_cannot_be(command: Command, words: str, said: str) -> None:
    done = command("bench", *words.split())
    assert (done.code, done.out) == (2, "")
    assert said in done.line


def test_bench_says_that_it_cannot_draw_before_it_times(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise SettingError("pictures need matplotlib")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("mgam.benchmarks.plots.pyplot", refuse)
    monkeypatch.setattr("mgam.benchmarks.suite.run", lambda *_, **__: 1 / 0)
    done = command("bench", "--out", str(tmp_path / "there"))
    assert (done.code, done.out) == (2, "")
    assert "pictures need matplotlib" in done.line
    assert not (tmp_path / "there").exists()


def test_env(command: Command) -> None:
    facts = json.loads(command("env", "--json").out)
    assert facts["packages"]["mgam"] == mgam.__version__
    assert facts["packages"]["torch"]
    assert facts["system"]["cores"] >= 1
    assert facts["memory"]["total_bytes"] > facts["memory"]["available_bytes"] > 0
    shown = command("env")
    assert shown.code == 0
    assert "transformers:" in shown.out


def test_methods(command: Command) -> None:
    listed = json.loads(command("methods", "--json").out)
    assert {"mgam", "dense"} <= {method["name"] for method in listed}
    assert all("causal" in method for method in listed)
    assert "mgam:" in command("methods").out


def completed(words: str) -> list[str]:
    """What a shell offers for the last of some words, by the script that `--show-completion` prints for it."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(mgam.__file__).parents[1]),
        "_MGAM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run([sys.executable, "-m", "mgam"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


def test_shell_completion() -> None:
    assert completed("mgam me") == ["methods"]
    assert {"ask", "digest", "env"} <= set(completed("mgam "))
    assert completed("mgam ask book.txt --posit") == ["--positions"]
    assert completed("mgam ask book.txt --positions ") == ["granular", "absolute"]


def test_shell_completion_can_be_installed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"), raising=False)
    script = command("--show-completion", "bash").out
    assert "_MGAM_COMPLETE=complete_bash" in script
    assert "--install-completion" in command("--help").out


def test_version_and_help(command: Command) -> None:
    assert command("--version").out == f"mgam {mgam.__version__}\n"
    assert command().out == command("--help").out
    assert "QUESTION" in command("ask", "--help").out
    unknown = command("aks")
    assert (unknown.code, unknown.out) == (2, "")
    assert "aks" in unknown.line


def test_data_without_a_command_shows_its_help(command: Command) -> None:
    shown = command("data")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == command("data", "--help").out
    assert "fetch" in shown.out


def test_libraries_are_kept_quiet() -> None:
    quiet_libraries()
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").getEffectiveLevel() == logging.ERROR


def test_eval_keeps_libraries_quiet(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert "unknown task" in command("eval", "--tasks", "nosuch").line
    assert os.environ["TQDM_DISABLE"] == "1"


def mgam_process(*words: str, **options: Any) -> subprocess.Popen[str]:
    root = Path(mgam.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mgam", *words], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_help_does_not_import_torch() -> None:
    program = "import sys; from mgam.cli import run; run(['ask', '--help']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(mgam.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True).returncode == 0


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = mgam_process("methods", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)


def test_missing_file_from_the_shell() -> None:
    process = mgam_process("ask", "nowhere.txt", QUESTION)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == "mgam: nowhere.txt does not exist; check the name, or give - for standard input\n"

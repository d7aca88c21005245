"""`mgam ask`: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import mgam
from mgam.documents import asking
from mgam.documents.asking import Answer
from mgam.documents.estimate import Estimate
from mgam.documents.evidence import Evidence
from mgam.errors import UnsupportedModelError
from mgam.integrations import loading

from .conftest import QUESTION, Command


class FakeTokenizer:
    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": text.split()})()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces loading, applying and asking; holds what they were called with."""
    seen: dict[str, Any] = {}

    def load(name: str | None, **options: Any) -> loading.Loaded:
        seen["load"] = {"name": name, **options}
        return loading.Loaded("model", FakeTokenizer())  # type: ignore[arg-type]

    def apply(model: Any, method: str, **settings: Any) -> Any:
        seen["apply"] = {"method": method, **settings}
        return model

    def ask(model: Any, tokenizer: Any, sources: Any, questions: Sequence[str], **options: Any) -> Iterator[Answer]:
        seen["ask"] = {"sources": sources, "questions": questions, **options}
        for done in (100, 180):
            options["on_progress"](done, 180)
        for number, _ in enumerate(questions):
            for piece in (" Ada", " keeps it."):
                options["on_text"](piece)
            sure = (0.9, 0.1, 0.9)[number]
            yield Answer(
                answer="Ada keeps it.",
                evidence=[Evidence(sources[0].name, 4, 40, sources[0].text[4:40], 0.75)],
                entries_per_level={"1": 150.0, "64": 2.5},
                tokens={"document": 180, "question": 7, "answer": 4},
                seconds={"reading": 1.5, "answering": 0.25},
                peak_memory_bytes=2**30,
                settings={"budget": 1024},
                confidence=sure,
                found=sure > 0.5,
            )

    def estimate(model: Any, tokens: int) -> Estimate:
        seen["estimate"] = tokens
        return Estimate(tokens, 83.0, 2**29, 2**33)

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(mgam, "apply", apply, raising=False)
    monkeypatch.setattr(asking, "ask_each", ask)
    monkeypatch.setattr("mgam.documents.estimate.estimate", estimate)
    return seen


def test_answer_evidence_and_facts(command: Command, calls: dict[str, Any], text: str) -> None:
    done = command("ask", text, QUESTION)
    assert done.code == 0
    assert done.out.startswith("Ada keeps it.\n")
    assert "75%" in done.out
    assert "lighthouse on the island" in done.out
    assert "4 to 40" in done.out
    assert "tokens 150, summaries of 64 tokens 2" in done.out
    assert "1.00 GiB" in done.out
    assert "180 of 180 tokens" in done.err
    assert "tokens/s" in done.err
    assert "180 tokens: reading will take about 1 min 23 s, about 0.5 GiB (8.0 GiB are free)" in done.err
    assert done.err.index("1 min 23 s") < done.err.index("tokens/s")
    assert "yes, confidence 0.90" in done.out
    assert calls["estimate"] == len(Path(text).read_text().split())


def test_json_prints_one_object_and_nothing_else(command: Command, calls: dict[str, Any], text: str) -> None:
    done = command("ask", text, QUESTION, "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    wanted = {"answer", "evidence", "entries_per_level", "tokens", "seconds", "peak_memory_bytes", "settings"}
    assert wanted | {"question", "confidence", "found", "estimate"} == set(result)
    assert result["estimate"] == {"tokens": 180, "seconds": 83.0, "memory_bytes": 2**29, "free_bytes": 2**33}
    assert set(result["evidence"][0]) == {"file", "start", "end", "text", "share"}
    assert result["evidence"][0]["file"] == text
    assert result["seconds"]["reading"] == 1.5
    assert result["seconds"]["loading"] >= 0


def test_several_questions(command: Command, calls: dict[str, Any], text: str) -> None:
    more = ("-q", "Since when?", "--question", " Where? ")
    done = command("ask", text, QUESTION, *more)
    assert done.code == 0
    assert calls["ask"]["questions"] == [QUESTION, "Since when?", "Where?"]
    places = [done.out.index(f"{question}\nAda keeps it.\n") for question in calls["ask"]["questions"]]
    assert places == sorted(places)
    assert done.out.count("What the answer rests on") == 3
    assert done.out.count("Perhaps not found in the text: the confidence is 0.10") == 1
    assert calls["load"]
    listed = json.loads(command("ask", text, QUESTION, *more, "--json").out)
    assert [one["question"] for one in listed] == calls["ask"]["questions"]
    assert [one["found"] for one in listed] == [True, False, True]
    assert [one["seconds"]["loading"] > 0 for one in listed] == [listed[0]["seconds"]["loading"] > 0, False, False]


def test_options_reach_the_library(command: Command, calls: dict[str, Any], text: str) -> None:
    options = (
        "--model m --budget 256 --device cpu --max-new-tokens 9 --lookahead none --dense-until 128 --dtype bfloat16"
    )
    options += " --download --method dyadic --positions absolute"
    assert command("ask", text, text, QUESTION, *options.split()).code == 0
    assert calls["load"].items() >= {"name": "m", "device": "cpu", "dtype": "bfloat16", "download": True}.items()
    dials = {"budget": 256, "lookahead": "none", "dense_until": 128, "positions": "absolute"}
    assert calls["apply"] == {"method": "dyadic", **dials}
    assert calls["ask"]["max_new_tokens"] == 9
    assert [source.name for source in calls["ask"]["sources"]] == [text, text]


def test_the_default_is_the_library_default_with_a_second_look(
    command: Command, calls: dict[str, Any], text: str
) -> None:
    assert command("ask", text, QUESTION).code == 0
    assert calls["load"].items() >= {"name": None, "device": "auto", "dtype": None, "download": False}.items()
    assert calls["apply"] == {"method": "mgam", "reread": 2048}
    assert command("ask", text, QUESTION, "--reread", "0").code == 0
    assert calls["apply"] == {"method": "mgam", "reread": 0}
    assert command("ask", text, QUESTION, "--method", "quest").code == 0
    assert "reread" not in calls["apply"]


def test_standard_input(command: Command, calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Ada keeps the lighthouse.")))
    assert command("ask", "-", QUESTION).code == 0
    assert calls["ask"]["sources"][0].text == "Ada keeps the lighthouse."


def test_markup_in_a_text_is_shown_as_it_is(command: Command, calls: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "markup.txt"
    path.write_text("xxx [bold]lamp[/bold] [/oops] more text that goes on and on")
    done = command("ask", str(path), QUESTION)
    assert done.code == 0
    assert "[bold]lamp[/bold]" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], 'a file and a question are wanted, as in: mgam ask FILE "Who is the captain?"'),
        (["FILE"], "a file and a question are wanted"),
        ([QUESTION], "a file and a question are wanted"),
        (["-q", QUESTION], "a file and a question are wanted"),
        (["FILE", "FILE"], "is the name of a file"),
        (["FILE", ""], "question is empty"),
        (["FILE", "  \n"], "question is empty"),
        (["FILE", QUESTION, "-q", " "], "one of the questions is empty"),
        (["FILE", QUESTION, "--positions", "relative"], "'relative'"),
        (["FILE", QUESTION, "--budget", "lots"], "'lots' is not a whole number"),
        (["FILE", QUESTION, "--budget", "3"], "budget=3"),
        (["FILE", QUESTION, "--budget", "-64"], "budget=-64"),
        (["FILE", QUESTION, "--budget"], "--budget"),
        (["FILE", QUESTION, "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["FILE", QUESTION, "--dense-until", "-1"], "dense_until=-1"),
        (["FILE", QUESTION, "--lookahead", "far"], "'far'"),
        (["FILE", QUESTION, "--dtype", "int3"], "Invalid value for '--dtype': 'int3'"),
        (["FILE", QUESTION, "--method", "magic"], "unknown method 'magic'"),
        (["FILE", QUESTION, "--no-such-option"], "--no-such-option"),
        (["nowhere.txt", QUESTION], "nowhere.txt does not exist"),
        (["-", "-", QUESTION], "more than once"),
    ],
)
def test_bad_input(command: Command, text: str, words: list[str], said: str) -> None:
    words = ["ask", *(text if word == "FILE" else word for word in words)]
    plain = command(*words)
    assert (plain.code, plain.out) == (2, "")
    assert said in plain.line
    as_json = command(*words, "--json")
    assert (as_json.code, as_json.err) == (2, "")
    assert said in as_json.error["message"] or words[-1] == "--budget"


def test_the_question_may_come_as_an_option(command: Command, calls: dict[str, Any], text: str) -> None:
    for files in ([text], [text, text]):
        assert command("ask", *files, "-q", QUESTION).code == 0
        assert calls["ask"]["questions"] == [QUESTION]
        assert [source.name for source in calls["ask"]["sources"]] == files


@pytest.mark.parametrize("data", [b"", b" \n", b"%PDF-1.7", b"\x00\x01\x02", b"caf\xe9"])
def test_bad_files(command: Command, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    assert command("ask", str(path), QUESTION).code == 2
    assert command("ask", str(path), QUESTION, "--json").error["kind"] == "DocumentError"


def test_bad_models(command: Command, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF and no more")
    for name in (str(damaged), str(tmp_path), "someone/no-such-model", "./nowhere"):
        done = command("ask", text, QUESTION, "--json", "--model", name)
        assert (done.code, done.error["kind"]) == (2, "ModelFileError")
    done = command("ask", text, QUESTION, "--json", "--device", "abacus")
    assert (done.code, done.error["kind"]) == (2, "SettingError")


@pytest.mark.parametrize(
    ("error", "code", "kind", "said"),
    [
        (UnsupportedModelError("reason one;\nreason two"), 2, "UnsupportedModelError", "reason one; reason two"),
        (KeyboardInterrupt(), 130, "Interrupted", "stopped"),
        (MemoryError(), 2, "MemoryBudgetError", "shorter text"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "MemoryBudgetError", "shorter text"),
        (RuntimeError("CUDA out of memory."), 2, "MemoryBudgetError", "shorter text"),
        (
            ZeroDivisionError("half of\nnothing"),
            1,
            "InternalError",
            "ZeroDivisionError: half of nothing; set MGAM_DEBUG",
        ),
    ],
)
def test_whatever_happens_while_reading(
    command: Command,
    calls: dict[str, Any],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    kind: str,
    said: str,
) -> None:
    def ask(*_: Any, on_progress: Callable[[int, int], None], **__: Any) -> Iterator[Answer]:
        on_progress(1, 180)
        raise error

    monkeypatch.setattr(asking, "ask_each", ask)
    plain = command("ask", text, QUESTION)
    assert plain.code == code
    assert said in plain.err.splitlines()[-1]
    assert "Traceback" not in plain.err
    as_json = command("ask", text, QUESTION, "--json")
    assert (as_json.code, as_json.error["kind"]) == (code, kind)


def test_a_path_that_fails_while_working_is_no_fault_of_mgam(
    command: Command, calls: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ask_each", lambda *_, **__: Path(text, "x").write_text(""))
    error = command("ask", text, QUESTION, "--json").error
    assert error["kind"] == "FileError"
    assert f"{Path(text, 'x')} cannot be read or written" in error["message"]


def test_a_full_disk_is_no_fault_of_mgam(
    command: Command, calls: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")  # as a write to an open file has it: without a name

    monkeypatch.setattr(asking, "ask_each", fill)
    done = command("ask", text, QUESTION, "--json")
    assert (done.code, done.error["kind"]) == (2, "FileError")
    assert "(No space left on device); make room" in done.error["message"]


def test_debug_shows_where(command: Command, calls: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGAM_DEBUG", "")  # so that the variable is put back after the test
    monkeypatch.setattr(asking, "ask_each", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError: division by zero" in command("--debug", "ask", text, QUESTION).err.split("Traceback")[1]


def test_too_little_memory(command: Command, calls: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgam.errors import MemoryBudgetError

    def refuse(*_: Any) -> None:
        raise MemoryBudgetError("reading 180 tokens takes 9 GiB, and 1 GiB are free")

    monkeypatch.setattr("mgam.documents.estimate.estimate", refuse)
    done = command("ask", text, QUESTION, "--json")
    assert (done.code, done.error["kind"]) == (2, "MemoryBudgetError")
    assert "ask" not in calls

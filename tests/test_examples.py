"""The texts and questions that are shipped, and the demo's check of the answer."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUESTIONS: list[dict[str, str]] = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))


def place(row: dict[str, str]) -> float:
    """Where the passage of a question begins, from 0 to 1."""
    text = (EXAMPLES / row["file"]).read_text(encoding="utf-8")
    assert text.count(row["passage"]) == 1
    return text.index(row["passage"]) / len(text)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo")


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["question"])
def test_answers_stand_in_the_text_far_from_both_ends(row: dict[str, str]) -> None:
    assert 0.3 < place(row) < 0.7
    text = (EXAMPLES / row["file"]).read_text(encoding="utf-8")
    start = text.index(row["passage"])
    assert re.search(row["expected"], text[start : start + 300], re.IGNORECASE)
    assert not re.search(row["expected"], row["question"], re.IGNORECASE) or "Keeling" in row["question"]


def test_the_text_is_eight_times_what_the_model_was_trained_on() -> None:
    from transformers import AutoTokenizer

    from mgam.integrations.loading import locate

    tokenizer: Any = AutoTokenizer.from_pretrained(locate(None), local_files_only=True)
    text = (EXAMPLES / QUESTIONS[0]["file"]).read_text(encoding="utf-8")
    count = len(tokenizer(text, verbose=False).input_ids)
    assert count > 8 * 8192
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"{len(text):,} characters, {count:,} tokens" in readme


@pytest.mark.parametrize(("answer", "code"), [("It dropped from 5,200 in 1966.", 0), ("The year 1974.", 1)])
def test_the_demo_checks_the_answer(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, code: int
) -> None:
    # The right words in the evidence do not make a wrong answer right.
    monkeypatch.setattr(demo, "_run", lambda _: f"{answer}\n\nWhat the answer rests on\n from a peak of 5,200 in 1966")
    first = demo.Question("factbook-lands.txt", "From what peak?", "5,?200", "from a peak of 5,200 in 1966")
    monkeypatch.setattr(demo, "questions", lambda: [first])
    assert demo.main() == code
    assert ("WRONG" in capsys.readouterr().err) == bool(code)


def test_the_demo_fails_when_the_command_fails(demo: ModuleType) -> None:
    import sys

    with pytest.raises(SystemExit) as left:
        demo._run([sys.executable, "-c", "print('half'); raise SystemExit(3)"])
    assert left.value.code == 3
    assert demo._run([sys.executable, "-c", "print('✓')"]) == "✓\n"

"""The map of an answer: what it counts, what the page holds, and when there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mgam.cli import run
from mgam.documents.asking import Answer, ask_each
from mgam.documents.chart import Chart, page_data, write_map
from mgam.documents.prompt import Prompt
from mgam.errors import DocumentError

from .conftest import Command
from .tiny import SETTINGS, make_model, make_tokenizer, source, text

Charted = tuple[Chart, Prompt, Answer]
QUESTIONS = ["Where is the island?", "And the mast?"]


@pytest.fixture(scope="module")
def charted() -> list[Charted]:
    found: list[Charted] = []
    list(
        ask_each(
            make_model(), make_tokenizer(), [source(1500)], QUESTIONS, max_new_tokens=4,
            on_chart=lambda *one: found.append(one),
        )
    )  # fmt: skip
    return found


def test_every_answering_query_reads_every_passage_once(charted: list[Charted]) -> None:
    """Over the levels, what was read of a chunk before the window adds up to all queries that answered."""
    sizes = SETTINGS["levels"]
    for chart, prompt, answer in charted:
        assert chart.answering == prompt.question + answer.tokens["answer"] - 1
        assert chart.windows is not None
        before = (prompt.document - SETTINGS["window"] - SETTINGS["question_block"]) // sizes[1]
        for levels in chart.reads.values():
            total = levels[0][:, :before] + levels[1][:, :before]
            coarse = levels[2].repeat_interleave(sizes[2] // sizes[1], 1)[:, :before]
            assert ((total + coarse) == chart.answering).all()


def test_a_second_question_begins_anew(charted: list[Charted]) -> None:
    first, second = (chart for chart, _, _ in charted)
    assert first.budgets.keys() == second.budgets.keys()
    assert first.answering != second.answering or first.reads is not second.reads


def test_the_page_holds_what_it_shows(charted: list[Charted], tmp_path: Path) -> None:
    chart, prompt, answer = charted[0]
    sizes = tuple(SETTINGS["levels"])
    write_map(tmp_path / "map.html", chart, prompt, answer, sizes)
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    found = re.search(r"const data = (\{.*\});\n", page)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    assert data["question"] == QUESTIONS[0]
    assert len(data["texts"]) == data["chunks"] == -(-prompt.document // sizes[1])
    assert sum(data["entries"]) < prompt.document
    assert data == json.loads(json.dumps(page_data(chart, prompt, answer, sizes)))
    for one, passage in zip(data["evidence"], answer.evidence, strict=True):
        assert data["texts"][one["first"]].strip()[:10] in passage.text


def test_a_text_that_is_read_in_full_has_no_map(tmp_path: Path) -> None:
    found: list[Charted] = []
    model = make_model(dense_until=512)
    list(
        ask_each(
            model,
            make_tokenizer(),
            [source(100)],
            QUESTIONS[:1],
            max_new_tokens=2,
            on_chart=lambda *one: found.append(one),
        )
    )
    with pytest.raises(DocumentError, match="short enough to be read in full"):
        write_map(tmp_path / "map.html", *found[0], tuple(SETTINGS["levels"]))


@pytest.mark.parametrize(("words", "hint"), [(1000, " (--dense-until 128 reads them by choice)"), (100, "")])
def test_a_command_without_a_map_to_draw_still_answers(command: Command, tmp_path: Path, words: int, hint: str) -> None:
    (tmp_path / "short.txt").write_text(text(words))
    asked = ("ask", "short.txt", "who?", "--max-new-tokens", "2", "--map", "map.html")
    code, out, err = command(*asked, "--json")
    assert code == 0
    tokens = json.loads(out)["tokens"]["document"]
    assert err == f"no map: all {tokens:,} tokens were read in full{hint}\n"
    code, out, err = command(*asked)
    assert code == 0
    assert "found" in out
    assert f"\nno map: all {tokens:,} tokens were read in full{hint}\n" in err
    assert not (tmp_path / "map.html").exists()


def test_what_cannot_be_drawn_is_refused_before_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "text.txt"
    short.write_text("Some words.")
    for more, said in (
        (["--method", "dense", "--map", str(tmp_path / "map.html")], "--method dense does not do"),
        (["--map", str(tmp_path / "no" / "map.html")], "there is no folder"),
        (["--map", str(tmp_path)], "is a folder, and a file is wanted"),
    ):
        assert run(["ask", str(short), "What?", *more]) == 2
        assert said in capsys.readouterr().err

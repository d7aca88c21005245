"""Splits, sources and records."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgam.errors import DocumentError, SettingError
from mgam.evaluation.fetch import fetch_sources
from mgam.evaluation.published.records import RecordError, hotpot, longbench, narrative, news
from mgam.evaluation.splits import split_of
from mgam.evaluation.texts import TextLibrary, split_sentences, words

from .conftest import FIXTURES


def test_splits_are_fixed_for_ever() -> None:
    known = {"moby-dick": "tune", "emma": "tune", "persuasion": "test", "sense-and-sensibility": "train"}
    assert {name: split_of("novels", name) for name in known} == known
    drawn = [split_of("speeches", str(number)) for number in range(4000)]
    assert abs(drawn.count("test") - 2000) < 120
    assert abs(drawn.count("tune") - 1000) < 100


def test_the_shipped_excerpt_is_tune_text_and_prose_is_endless() -> None:
    """Defaults were chosen on it: tasks read it where nothing else is there, and no figure is told to be of TEST."""
    library = TextLibrary(Path("/nonexistent"))
    assert [text.split for text in library.texts("shipped", None)] == ["tune"]
    assert library.texts("shipped", "test") == ()
    assert [text.name for text in library.for_tasks("shipped")] == ["moby-dick"]
    assert library.prose_source == "shipped"
    prose = library.prose(random.Random(1))
    assert len([next(prose) for _ in range(5000)]) == 5000
    assert len(words()) > 8000
    assert len(set(words())) == len(words())


def test_sentences_join_to_the_text() -> None:
    text = "One. Two!\nStill two, no stop\n\nThree? Four."
    assert "".join(split_sentences(text)) == "\n\nOne. Two! Still two, no stop\n\nThree? Four."


def test_a_source_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="mgam data fetch factbook"):
        TextLibrary(tmp_path).texts("factbook")
    with pytest.raises(SettingError, match="speeches"):
        fetch_sources(["speech"], root=tmp_path)
    with pytest.raises(SettingError, match="--from"):
        fetch_sources(["novels"], root=tmp_path, files=tmp_path)
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "manifest.json").write_text("{")
    with pytest.raises(DocumentError, match="--again"):
        TextLibrary(tmp_path).version("essays")


def test_both_forms_of_hotpotqa_give_equal_records() -> None:
    rows = [json.loads(line) for line in (FIXTURES / "hotpotqa" / "a.jsonl").read_text().splitlines()]
    hub = rows[0]
    raw = {
        "_id": hub["id"],
        "question": hub["question"],
        "answer": hub["answer"],
        "context": list(zip(hub["context"]["title"], hub["context"]["sentences"], strict=True)),
        "supporting_facts": list(zip(*hub["supporting_facts"].values(), strict=True)),
    }
    assert hotpot(hub) == hotpot(raw)
    assert hotpot(rows[1]).facts == (("Grey Hills", 0), ("Mount Tarn", 0))  # a sentence that does not exist is dropped
    hub["context"]["title"].pop()
    with pytest.raises(RecordError, match="context"):
        hotpot(hub)
    with pytest.raises(RecordError, match="answer"):
        hotpot({**rows[2], "answer": ""})


def test_both_names_of_longbench_questions_are_known() -> None:
    base = {"context": "c", "answers": ["a"], "dataset": "qasper", "_id": "1", "all_classes": None}
    assert longbench({**base, "input": "why?"}) == longbench({**base, "question": "why?"})
    for wrong in ({}, {"input": "q", "answers": []}, {"input": "q", "context": ""}):
        with pytest.raises(RecordError):
            longbench({**base, **wrong})


def test_other_records_are_checked_too() -> None:
    with pytest.raises(RecordError, match="article"):
        news({"id": "1", "article": "", "highlights": "x"})
    with pytest.raises(RecordError, match="document"):
        narrative({"question": {"text": "q"}, "answers": []})


def test_published_records_come_from_files_or_are_refused_in_words(
    library: TextLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [len(library.records(name, None)) for name in ("hotpotqa", "narrativeqa", "cnn_dailymail")] == [3, 2, 2]
    assert len(library.records("longbench", None)) == 16
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(DocumentError, match="record 0 of hotpotqa"):
        fetch_sources(["hotpotqa"], root=tmp_path, files=bad, say=lambda message: None)
    with pytest.raises(SettingError, match="holds no"):
        fetch_sources(["hotpotqa"], root=tmp_path, files=tmp_path / "none", say=lambda message: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(DocumentError, match="synthetic"):
        fetch_sources(["hotpotqa"], root=tmp_path, say=lambda message: None)


@pytest.mark.parametrize("name", ["hotpotqa", "narrativeqa", "cnn_dailymail", "longbench"])
def test_the_hub_gives_what_files_of_its_form_give(
    name: str, library: TextLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader by hub id, with a hub that hands out the fixture: the same records, read as a stream."""
    rows = [json.loads(line) for line in (FIXTURES / name / "a.jsonl").read_text().splitlines()]
    asked: list[tuple[Any, ...]] = []

    def load_dataset(hub: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append((hub, config, split, streaming))
        return [row for row in rows if name != "longbench" or row["dataset"] == config]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    fetch_sources([name], root=tmp_path, say=lambda message: None)
    fetched = TextLibrary(tmp_path).records(name, None)
    assert sorted(map(str, fetched.values())) == sorted(map(str, library.records(name, None).values()))
    assert all(split in ("test", "validation") and streaming for _, _, split, streaming in asked)
    assert len({hub for hub, *_ in asked}) == 1


def test_a_hub_that_is_not_reached_names_the_data_set_and_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*given: Any, **more: Any) -> Any:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DocumentError, match=r"hotpot.*cannot be reached \(ConnectionError: no route to host\).*synthetic"
    ):
        fetch_sources(["hotpotqa"], root=tmp_path, say=lambda message: None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DocumentError, match=r"mgam\[eval\].*synthetic"):
        fetch_sources(["hotpotqa"], root=tmp_path, say=lambda message: None)

"""Readers over a tiny random model: what they report, and that batches change no answer."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mgam.documents.prompt import build
from mgam.documents.sources import Source
from mgam.errors import DocumentError, SettingError
from mgam.evaluation.adapters import ModelReader
from mgam.evaluation.reader import BatchReader, LossReader
from mgam.evaluation.session import Session, evaluate_session
from mgam.evaluation.texts import words

_RNG = random.Random(5)
DOCUMENTS = [" ".join(_RNG.choices(words(), k=180 + 40 * number)) for number in range(3)]
QUESTIONS = ["Which day was quiet?", "Was it quiet?", "What was quiet on that day?"]


SPARSE = "mgam:dense_until=256:budget=256:window=128"
CAUSAL = f"{SPARSE}:lookahead=none"  # with lookahead, a block that the end of a call cuts is decided without it


@pytest.mark.parametrize("label", ["dense", CAUSAL])
def test_a_batch_answers_as_single_readings_do(tiny: tuple[Any, Any], label: str) -> None:
    reader = ModelReader(*tiny, label, name="tiny")
    assert isinstance(reader, BatchReader)
    batch = reader.read_batch(DOCUMENTS, QUESTIONS, 6)
    single = [reader.read(document, question, 6) for document, question in zip(DOCUMENTS, QUESTIONS, strict=True)]
    reader.close()
    assert [one.answer for one in batch] == [one.answer for one in single]
    assert all(one.seconds > 0 and one.peak_memory_bytes > 0 for one in [*batch, *single])
    assert all(0 < (one.preprocess_seconds or 0) < one.seconds for one in [*batch, *single])


def test_fewer_entries_are_read_and_evidence_is_shown(tiny: tuple[Any, Any]) -> None:
    dense, sparse = (ModelReader(*tiny, label, name="tiny") for label in ("dense", SPARSE))
    whole = dense.read(DOCUMENTS[2], QUESTIONS[2], 4)
    few = sparse.read(DOCUMENTS[2], QUESTIONS[2], 4)
    assert not whole.evidence
    assert few.evidence
    assert all(0 <= one.start < one.end <= len(DOCUMENTS[2]) for one in few.evidence)
    assert few.entries_per_query < 0.8 * whole.entries_per_query
    assert sparse.settings["budget"] == 256
    assert dense.settings["trained_window"] == 4096
    sparse.close()


def test_losses_are_those_of_one_pass_and_of_a_budget_that_covers_all(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    text = DOCUMENTS[0]
    dense, full = (ModelReader(model, tokenizer, label, name="tiny") for label in ("dense", "mgam:budget=8192"))
    assert isinstance(dense, LossReader)
    found = dense.losses(text)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert found.losses == pytest.approx(expected.tolist(), abs=2e-4)
    assert full.losses(text).losses == pytest.approx(expected.tolist(), abs=2e-4)
    full.close()


def test_memory_that_is_not_there_is_said(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from mgam.evaluation.reader import DoesNotFitError
    from mgam.integrations import memory

    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    with pytest.raises(DoesNotFitError, match="takes about"):
        ModelReader(*tiny, "dense", name="tiny").read(DOCUMENTS[0], QUESTIONS[0], 4)
    monkeypatch.undo()
    reader = ModelReader(*tiny, "dense", name="tiny")

    def out_of_memory(*words: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr(tiny[0], "generate", out_of_memory)
    with pytest.raises(DoesNotFitError, match="80 GiB"):
        reader.read(DOCUMENTS[0], QUESTIONS[0], 4)


def test_a_tokenizer_without_a_chat_template_is_asked_in_plain_words(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    assert not tokenizer.chat_template
    prompt = build(tokenizer, [Source("a", DOCUMENTS[0])], QUESTIONS[0])
    text = tokenizer.decode(prompt.ids)
    assert text.endswith(f"{QUESTIONS[0]}\nAnswer:")
    assert DOCUMENTS[0] in text
    source, start, end = prompt.place(prompt.document - 40, prompt.document - 20) or (None, 0, 0)
    assert source is not None
    assert 0 < start < end <= len(DOCUMENTS[0])


def test_a_chat_template_that_changes_the_text_is_refused(tiny: tuple[Any, Any]) -> None:
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(DocumentError, match="use a tokenizer without a template"):
        build(tokenizer, [Source("a", DOCUMENTS[0])], QUESTIONS[0])


def test_what_cannot_work_with_the_model_is_said_before_anything_is_read(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    for part in tiny:
        part.save_pretrained(tmp_path / "tiny")
    wanted = Session(
        tasks=["passkey"], lengths="512", methods=["longheads:window=9000"], model=str(tmp_path / "tiny"), trials=1,
        device="cpu", results=tmp_path / "results.jsonl",
    )  # fmt: skip
    with pytest.raises(SettingError, match=r"trained for 4096.*choose a smaller window"):
        evaluate_session(wanted, Console(quiet=True))
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.slow
def test_two_processes_share_a_run(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    """`mgam eval` under a launcher: every trial is read once, and the first process gathers and reports."""
    pytest.importorskip("accelerate")
    for part in tiny:
        part.save_pretrained(tmp_path / "tiny")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += ["-m", "mgam", "eval", "--model", str(tmp_path / "tiny"), "--device", "cpu", "--tasks", "passkey"]
    words += ["--lengths", "512", "--trials", "4", "--json", "--results", str(tmp_path / "all.jsonl")]
    place = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False, env=place)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert [(row["method"], row["trials"]) for row in rows] == [("dense", 4), ("mgam", 4)]
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    read = [(line["method"], line["trial"]) for line in lines if "trial" in line]
    assert len(read) == len(set(read)) == 8
    assert len(lines) - len(read) == 2  # each process said under which conditions it ran
    assert not list(tmp_path.glob("all.jsonl.*"))


CREW = """
import os, sys, time
from pathlib import Path
from mgam.evaluation.session import _Crew
from mgam.processes import leave

rank = int(os.environ["RANK"])
crew = _Crew(Path(sys.argv[1]), "cpu")
crew.begin(print)
time.sleep(3 * rank)
crew.own.write_text('{"run": {}}\\n')
crew.end(print)
leave()
"""


@pytest.mark.slow
def test_the_first_process_waits_for_a_slow_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "crew.py").write_text(CREW)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += [str(tmp_path / "crew.py"), str(tmp_path / "all.jsonl")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2
    assert not list(tmp_path.glob("all.jsonl.*"))

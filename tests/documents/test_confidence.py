"""Confidence: what an answer's tokens are worth with the text, weighted by how little they were expected without it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mgam.documents import confidence as module
from mgam.documents.asking import ask
from mgam.documents.document import Document
from mgam.documents.prompt import bare, build

from . import tiny

QUESTION = "who keeps the light?"


@pytest.mark.parametrize("template", [True, False])
def test_it_is_the_weighted_mean(template: bool) -> None:
    """Against logits of one dense pass over all that was read and said."""
    tokenizer, model = tiny.make_tokenizer(template=template), tiny.make_plain_model()
    source = tiny.source(200)
    answer = ask(model, tokenizer, [source], QUESTION, max_new_tokens=7)
    prompt = build(tokenizer, [source], QUESTION)
    ids = torch.tensor([prompt.ids])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]

    def given(before: list[int]) -> torch.Tensor:
        whole = torch.cat((torch.tensor(before), new))[None]
        scores = torch.log_softmax(model(whole).logits[0, len(before) - 1 : -1], -1)
        return scores.gather(1, new[:, None])[:, 0]

    with torch.no_grad():
        sure, weight = given(prompt.ids), -given(bare(tokenizer, QUESTION))
    expected = math.exp(float((sure * weight).sum() / weight.sum()))
    assert answer.confidence == pytest.approx(expected, abs=2e-4)
    assert answer.found is (answer.confidence >= module.FOUND)


def test_a_question_alone_holds_no_text(tokenizer: Any) -> None:
    assert QUESTION in tokenizer.decode(bare(tokenizer, f" {QUESTION} "))
    assert "text" not in tokenizer.decode(bare(tokenizer, QUESTION))


def test_digests_have_it_too(tokenizer: Any, tmp_path: Path) -> None:
    document = Document.digest(tiny.make_model(), tokenizer, [tiny.source(300)], tmp_path / "book.mgam", **tiny.GRID)
    answer = document.ask(QUESTION, max_new_tokens=5)
    assert answer.confidence is not None
    assert 0 < answer.confidence < 1
    assert answer.found is (answer.confidence >= module.FOUND)
    document.close()


def test_the_threshold_marks(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for threshold, found in ((0.0, True), (1.1, False)):
        monkeypatch.setattr(module, "FOUND", threshold)
        assert ask(tiny.make_model(), tokenizer, [tiny.source(300)], QUESTION, max_new_tokens=3).found is found


def test_unknown_where_nothing_was_watched(tokenizer: Any) -> None:
    assert module.confidence(tiny.make_model(), tokenizer, QUESTION, torch.tensor([5, 6]), module.Watch()) is None
    assert module.is_found(None) is None


def test_after_a_second_look_more_is_wanted() -> None:
    between = (module.FOUND + module.FOUND_AGAIN) / 2
    assert module.is_found(between)
    assert not module.is_found(between, again=True)
    assert module.is_found(module.FOUND_AGAIN, again=True)

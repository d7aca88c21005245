"""Several questions of texts that were read once: each is answered as if it were the only one."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest

from mgam.documents.asking import Answer, ask, ask_each
from mgam.errors import DocumentError
from mgam.integrations.transformers.apply import apply
from mgam.pyramid import Pyramid
from models.zoo import BY_NAME

from . import tiny

QUESTIONS = ["who keeps the light?", "where?", "since when does the captain of the whale ship keep it, and why?"]
METHODS = ["mgam", "dense", "dyadic", "streaming-llm", "snapkv", "h2o", "longheads"]


def timeless(answer: Answer) -> Answer:
    return replace(answer, seconds={}, peak_memory_bytes=0)


def each(model: Any, tokenizer: Any) -> None:
    sources = [tiny.source(500), tiny.source(300, 2)]
    together = list(ask_each(model, tokenizer, sources, QUESTIONS, max_new_tokens=6))
    alone = [ask(model, tokenizer, sources, question, max_new_tokens=6) for question in QUESTIONS]
    assert [timeless(answer) for answer in together] == [timeless(answer) for answer in alone]
    assert together[0].seconds["reading"] > 10 * together[1].seconds["reading"]
    assert len({answer.answer for answer in alone}) > 1


@pytest.mark.parametrize("lookahead", ["none", "block"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(tokenizer: Any, method: str, lookahead: str) -> None:
    settings = {**tiny.SETTINGS, "lookahead": lookahead}
    if method == "snapkv":
        settings["budget"] = 256
    each(apply(tiny.make_plain_model(window=4096), method, **settings), tokenizer)


def test_a_model_with_sliding_layers(tokenizer: Any) -> None:
    model = BY_NAME["gemma3"].make(vocab_size=300, max_position_embeddings=4096)
    model.name_or_path = "tiny"
    each(apply(model, **tiny.SETTINGS), tokenizer)
    each(model, tokenizer)


def test_a_model_that_reads_densely(tokenizer: Any) -> None:
    each(tiny.make_plain_model(window=4096), tokenizer)


def test_evidence_names_the_file(tokenizer: Any) -> None:
    sources = [tiny.source(500), tiny.source(300, 2)]
    answer = ask(tiny.make_model(), tokenizer, sources, QUESTIONS[0], max_new_tokens=4, evidence_count=20)
    texts = {source.name: source.text for source in sources}
    assert {passage.file for passage in answer.evidence} == set(texts)
    for passage in answer.evidence:
        assert texts[passage.file][passage.start : passage.end] == passage.text


def test_questions_that_cannot_be_asked(tokenizer: Any) -> None:
    model = tiny.make_model()
    with pytest.raises(DocumentError, match="no question"):
        ask_each(model, tokenizer, [tiny.source(50)], [])
    with pytest.raises(DocumentError, match="question is empty"):
        ask_each(model, tokenizer, [tiny.source(50)], ["who?", " "])


def pyramids() -> set[int]:
    """All that are there."""
    gc.collect()
    return {id(one) for one in gc.get_objects() if isinstance(one, Pyramid)}


def test_what_was_read_is_given_up_with_the_cache(tokenizer: Any) -> None:
    """A model that has read a long text must not hold it until it reads the next one."""
    model, before = tiny.make_model(), pyramids()
    ask(model, tokenizer, [tiny.source(400)], "who?", max_new_tokens=3)
    assert pyramids() <= before

"""A digest holds the tokens that `mgam ask` reads, and asks as it does."""

from __future__ import annotations

from typing import Any

import pytest

from mgam.documents.prompt import build
from mgam.documents.sources import Source
from mgam.documents.tokens import Frame, tokens_of
from mgam.integrations.loading import load

from . import tiny


def both(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those of a digest and the question after it."""
    sources = [Source("text", text)]
    asked = Frame.of(tokenizer).question(tokenizer, "Who sat?")
    return build(tokenizer, sources, "Who sat?").ids, [*tokens_of(tokenizer, sources).ids.tolist(), *asked]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "  \n"])
def test_a_digest_is_asked_as_the_text_is(tokenizer: Any, end: str) -> None:
    prompt, digest = both(tokenizer, "The cat sat. It slept." + end)
    assert prompt == digest == both(tokenizer, "The cat sat. It slept.")[0]


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("text", ["text.", "u", "Here is a text.", "A whale swims."])
def test_a_text_that_stands_in_the_words_before_it_is_found_where_it_is_given(text: str, template: bool) -> None:
    tokenizer = tiny.make_tokenizer(template=template)
    source = Source("text", text)
    prompt = build(tokenizer, [source], "Who sat?")
    assert prompt.document == len(tokens_of(tokenizer, [source]))
    assert prompt.place(0, prompt.document) == (source, 0, len(text))
    own = [prompt.place(place, place + 1) for place in range(prompt.document - len(text), prompt.document)]
    assert own == [(source, place, place + 1) for place in range(len(text))]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_so_for_the_default_model(end: str) -> None:
    """Its tokenizer joins line breaks where nothing follows them."""
    prompt, digest = both(load(None, device="cpu").tokenizer, "The cat sat. It slept." + end)
    assert prompt == digest

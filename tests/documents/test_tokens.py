"""A digest holds the tokens that `mgam ask` reads, and asks as it does."""

from __future__ import annotations

from typing import Any

import pytest

from mgam.documents.prompt import build
from mgam.documents.sources import Source
from mgam.documents.tokens import Frame, tokens_of
from mgam.integrations.loading import load


def both(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those of a digest and the question after it."""
    sources = [Source("text", text)]
    asked = Frame.of(tokenizer).question(tokenizer, "Who sat?")
    return build(tokenizer, sources, "Who sat?").ids, [*tokens_of(tokenizer, sources).ids.tolist(), *asked]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "  \n"])
def test_a_digest_is_asked_as_the_text_is(tokenizer: Any, end: str) -> None:
    prompt, digest = both(tokenizer, "The cat sat. It slept." + end)
    assert prompt == digest == both(tokenizer, "The cat sat. It slept.")[0]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_so_for_the_default_model(end: str) -> None:
    """Its tokenizer joins line breaks where nothing follows them."""
    prompt, digest = both(load(None, device="cpu").tokenizer, "The cat sat. It slept." + end)
    assert prompt == digest

"""What tests of digests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgam.documents.document import Document
from mgam.documents.sources import Source

from . import tiny

Make = Callable[..., Document]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny.make_model()


@pytest.fixture
def digest(model: Any, tokenizer: Any, tmp_path: Path) -> Make:
    def make(*sources: Source, name: str = "book.mgam", **options: Any) -> Document:
        return Document.digest(
            options.pop("model", model), tokenizer, sources, tmp_path / name, **{**tiny.GRID, **options}
        )

    return make

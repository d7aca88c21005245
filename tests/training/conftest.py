"""What tests of low-rank training share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from documents.tiny import text
from mgam.training.lookups import LookupMaker

Killed = Callable[[int], AbstractContextManager[None]]


class Stopped(Exception):
    """What ends a run before its time."""


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of prose."""
    path = tmp_path_factory.mktemp("texts") / "prose.txt"
    path.write_text(text(30_000).replace(" .", ".").replace("\n", " "), encoding="utf-8")
    return str(path)


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Killed:
    """A run inside dies where it wants this text."""
    make = LookupMaker.make

    @contextmanager
    def killed(text: int) -> Iterator[None]:
        def stopping(self: LookupMaker, number: int, tokens: int, questions: int) -> Any:
            if number == text:
                raise Stopped
            return make(self, number, tokens, questions)

        with monkeypatch.context() as patch:
            patch.setattr(LookupMaker, "make", stopping)
            with pytest.raises(Stopped):
                yield

    return killed

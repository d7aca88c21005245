"""The dispatcher: it says what it chose and why, and a refusal lists every reason."""

from __future__ import annotations

import pytest
import torch

from mgam.attend import choose, dispatch
from mgam.attend.dispatch import Backend, available
from mgam.errors import SettingError

QUERIES = torch.zeros(2, 4, 8, 16)


def no(*reasons: str) -> Backend:
    return Backend("none", lambda *args: args[0], lambda queries: list(reasons), automatic=True)


def test_the_choice_says_why() -> None:
    choice = choose(QUERIES)
    assert choice.backend in dispatch.BACKENDS
    assert "float32" in choice.reason
    assert "(2, 4, 8, 16)" in choice.reason
    assert "cpu" in choice.reason


def test_the_choice_says_what_was_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", {"none": no("too hot", "too cold"), **dispatch.BACKENDS})
    choice = choose(QUERIES)
    assert choice.backend != "none"
    assert "none: too hot, too cold" in choice.reason


def test_the_oracle_runs_only_when_asked_for() -> None:
    assert choose(QUERIES).backend != "reference"
    choice = choose(QUERIES, "reference")
    assert (choice.backend, choice.reason) == ("reference", "asked for")


def test_a_refusal_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", {"none": no("too hot", "too cold")})
    for backend in ("none", None):
        with pytest.raises(SettingError) as caught:
            choose(QUERIES, backend)
        assert "too hot" in str(caught.value)
        assert "too cold" in str(caught.value)
        assert "float32" in str(caught.value)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"'cuda-magic' is unknown.*torch.*reference"):
        choose(QUERIES, "cuda-magic")


def test_what_is_available_comes_with_reasons() -> None:
    found = available()
    assert set(found) == set(dispatch.BACKENDS)
    assert found["torch"] == []

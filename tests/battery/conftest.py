"""Fixtures of the battery: every case meets every backend, both kinds of positions and both lookaheads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mgam.attend.dispatch import BACKENDS
from mgam.schedule import Lookahead

from .cases import CASES, Case
from .trial import DEVICE, Trial, finest


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def serving() -> list[str]:
    """The backends that can serve on this machine."""
    return [name for name in BACKENDS if finest(name)]


def pytest_report_header() -> str:
    return f"battery: backends {', '.join(serving())} on {DEVICE}; left out here: {sorted({*BACKENDS} - {*serving()})}"


@pytest.fixture(params=serving())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in serving() if name != "reference"])
def fast(request: pytest.FixtureRequest) -> str:
    """Every backend but the reference: it reads the same covers, and reads them by the textbook (test_exactness)."""
    return request.param


@pytest.fixture(params=["absolute", "granular"])
def positions(request: pytest.FixtureRequest, case: Case) -> str:
    if request.param not in case.declared.positions:
        pytest.skip(f"{case.method} does not work with {request.param} positions")
    return request.param


@pytest.fixture(params=["none", "block"])
def lookahead(request: pytest.FixtureRequest) -> Lookahead:
    return request.param


@pytest.fixture
def trial(case: Case, backend: str, positions: str, lookahead: Lookahead) -> Trial:
    return Trial(case, backend, positions, lookahead, finest(backend))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Storage that nothing was written to holds NaN, so that reading it shows."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _filled(getattr(owner, name)))
        yield


def _filled(make: Any) -> Any:
    def poison(*args: Any, **options: Any) -> torch.Tensor:
        made = make(*args, **options)
        with torch.no_grad():
            return made.fill_(torch.nan) if made.is_floating_point() else made

    return poison

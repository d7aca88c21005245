"""No buffer grows with the square of the length, and no segment is larger than the room it is given."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mgam import engine
from mgam.attend import blockwise
from mgam.engine import read
from mgam.plan import Plan
from mgam.policies import eviction
from mgam.pyramid import Pyramid
from mgam.schedule import Lookahead

from .cases import CASES
from .trial import SCALE, Trial


class Largest(TorchDispatchMode):
    """Elements of the largest storage that anything writes while it is on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in tree_leaves(made):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.untyped_storage().nbytes() // part.element_size())
        return made


def largest(trial: Trial, tokens: int, dense_until: int, *, backward: bool = False) -> int:
    """The largest tensor of one pass over a whole text, in elements; the pyramid and the states were there before."""
    queries, keys, values = (part.requires_grad_(backward) for part in trial.states(tokens))
    schedule = trial.schedule(0, 0)
    with Largest() as seen:
        pyramid = Pyramid.of(keys, values, trial.levels)
        plan = Plan.of([schedule], [0], [tokens], tokens, dense_until)
        out = read(queries, pyramid, plan, trial.reading(dense_until), SCALE)
        if backward:
            out.sum().backward()
    return seen.elements


@pytest.fixture
def backend() -> str:
    """The reference is written to be read, not to be small."""
    return "torch"


@pytest.fixture
def lookahead() -> Lookahead:
    """Votes of earlier queries are as many as a block's own."""
    return "none"


@pytest.fixture
def positions() -> str:
    """Dense attention of the longest text here would leave the ranks of granular positions."""
    return "absolute"


def test_no_buffer_grows_with_the_square(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the text, at most about four times the largest tensor, where sixteen would be the square."""
    monkeypatch.setattr(engine, "CPU_ELEMENTS", 1 << 9)
    monkeypatch.setattr(eviction, "ELEMENTS", 1 << 9)
    for dense_until, backward in ((0, True), (800, False)):
        short, long = (largest(trial, tokens, dense_until, backward=backward) for tokens in (200, 800))
        assert long <= 4.5 * short


def test_the_watch_sees_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: computed in one piece, dense attention needs sixteen times the memory for four times the text."""
    monkeypatch.setattr(engine, "CPU_ELEMENTS", 1 << 30)
    monkeypatch.setattr(blockwise, "PREFIX", 1 << 30)
    short, long = (largest(Trial(CASES[0]), tokens, tokens) for tokens in (200, 800))
    assert long > 10 * short


def test_segments_fit_their_room(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room to spare the largest tensor is a few times the room that was given, or one block, or the text."""
    tokens, room = 512, 1 << 15
    monkeypatch.setattr(engine, "CPU_ELEMENTS", room)
    text = trial.states(tokens)[0].numel()
    monkeypatch.setattr(engine, "CPU_ELEMENTS", 1)
    block = largest(trial, tokens, 0)
    monkeypatch.setattr(engine, "CPU_ELEMENTS", room)
    assert largest(trial, tokens, 0) <= max(4 * room, block, text)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.method in ("longheads", "moba")], ids=lambda case: case.name
)
def test_covers_of_query_heads_are_cut_where_kernels_serve(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read covers of KV heads in place; what query heads chose is gathered on every device."""
    tokens, room = 512, 1 << 15
    monkeypatch.setattr(engine, "serving", lambda *given: "triton")
    monkeypatch.setattr(engine, "_kernel_elements", lambda *given: 1)  # what is read in place takes no room
    trial = Trial(case)
    text = trial.states(tokens)[0].numel()
    monkeypatch.setattr(engine, "CPU_ELEMENTS", 1)
    block = largest(trial, tokens, 0)
    monkeypatch.setattr(engine, "CPU_ELEMENTS", room)
    assert largest(trial, tokens, 0) <= max(4 * room, block, text)

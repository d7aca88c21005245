"""Gradients of the kernels against those of the oracle in float64, through tokens, summaries and window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mgam.attend import reference
from mgam.attend.triton import backend
from mgam.cover import Known
from test_triton_read import CASES as READ_CASES
from test_triton_read import WHOLE as WHOLE_CASES
from triton_cases import DTYPES, Case, Made, in_float64, needs_triton

pytestmark = needs_triton

CASES = {
    name: READ_CASES[name]
    for name in (
        "plain",
        "levels",
        "four levels",
        "granular",
        "granular, partial rotation",
        "softcap",
        "drop",
        "one query, granular",
        "single token",
        "no group",
        "dense, granular",
    )
} | {
    "ragged": Case(batch=2, lengths=(83, 9), tokens=83, sizes=(1, 8, 32), opened=2),
    "big chunk": Case(sizes=(1, 128, 256), search=4, tokens=420, opened=1, window=64, block=64, heads=1, few=2),
}


def leaves(made: Made) -> list[torch.Tensor]:
    """Queries and all levels as leaves of a graph; the pyramid of `made` then holds them."""
    found = [made.queries, *made.pyramid.keys, *made.pyramid.values]
    found = [leaf.detach().clone().requires_grad_() for leaf in found]
    made.queries = found[0]
    half = len(made.pyramid.keys)
    made.pyramid.keys, made.pyramid.values = list(found[1 : 1 + half]), list(found[1 + half :])
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_oracle(name: str) -> None:
    for dtype in DTYPES:
        compare(CASES[name].make(dtype))


@pytest.mark.parametrize("name", WHOLE_CASES)
def test_gradients_of_whole_tiles_equal_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that fill tiles: gradients of queries come by the copy engine, in one piece and in many."""
    from mgam.attend.triton import gradient, prefill

    monkeypatch.setattr(gradient, "WHOLE", prefill.WholeTiles(32, 16, registers=None))
    monkeypatch.setattr(prefill, "FAR_BYTES", 1 << 16)
    seen: list[bool] = []
    launched: list[object] = []
    described = gradient.described
    monkeypatch.setattr(gradient, "described", lambda *args: launched.append(args) or described(*args))
    monkeypatch.setattr(gradient, "fits", lambda *args: seen.append(prefill.fits(*args)) or seen[-1])
    for dtype in DTYPES:
        made = WHOLE_CASES[name].make(dtype)
        made.cover = replace(made.cover, known=Known(made.cover.window_start.cpu(), 0))
        compare(made)
    assert seen
    assert all(seen)
    assert bool(launched) == (made.cover.levels.chunk % 16 == 0)


@pytest.mark.parametrize("granular", [False, True])
def test_gradients_of_whole_tiles_as_they_come_equal_oracle(granular: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shapes of tiles that calls really take."""
    from mgam.attend.triton import gradient, prefill

    seen: list[bool] = []
    monkeypatch.setattr(gradient, "fits", lambda *args: seen.append(prefill.fits(*args)) or seen[-1])
    case = Case(tokens=384, sizes=(1, 64, 128), block=64, window=64, opened=2, heads=1, few=2, granular=granular)
    made = case.make(DTYPES[-1])
    made.cover = replace(made.cover, known=Known(made.cover.window_start.cpu(), 0))
    compare(made)
    assert seen == [True] * len(seen)
    assert seen


def compare(made: Made) -> None:
    """Gradients of all states against the oracle's."""
    wide = in_float64(made)
    wide_leaves, made_leaves = leaves(wide), leaves(made)
    want = reference.attend(
        wide.queries, wide.blocks, wide.cover, wide.pyramid, wide.positions, wide.scale, wide.softcap
    ).out
    pull = torch.randn_like(want)
    want.backward(pull)
    got = backend.attend(made.queries, made.blocks, made.cover, made.pyramid, made.positions, made.scale, made.softcap)
    made.compare(got, want)
    got.backward(pull.to(got))
    scale = max(float(leaf.grad.nan_to_num().norm()) for leaf in wide_leaves if leaf.grad is not None)
    for ours, theirs in zip(made_leaves, wide_leaves, strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad.nan_to_num()
        assert ours.grad is not None
        assert torch.isfinite(ours.grad).all()
        error = (ours.grad.cpu().double() - expected).norm()
        assert error <= made.tolerance * max(float(expected.norm()), 1e-1 * scale), (
            f"{error:.1e} of {expected.norm():.1e}"
        )


def test_same_bits_every_time() -> None:
    found = []
    torch.manual_seed(1)
    made = replace(CASES["granular"], few=4).make(DTYPES[-1])
    states = leaves(made)
    for _ in range(2):
        for leaf in states:
            leaf.grad = None
        backend.attend(
            made.queries, made.blocks, made.cover, made.pyramid, made.positions, made.scale
        ).square().sum().backward()
        found.append([leaf.grad.clone() for leaf in states if leaf.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

"""What modules keep while they stream: no more than later tokens may read, whatever the sizes and cuts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mgam import nn
from mgam.nn import SelfAttention, State

WIDTH, HEADS, TOKENS = 16, 4, 53

SIZES: dict[str, tuple[type[SelfAttention], list[dict[str, Any]]]] = {
    "local": (
        nn.LocalAttention,
        [
            {"kind": kind, "window": window, "stride": 3, "exchange": exchange, "global_tokens": lead}
            for kind in ("sliding", "strided", "dilated", "blockwise")
            for window in (1, 4, 9, 80)
            for exchange in ((0, 1, window) if kind == "blockwise" else (0,))
            for lead in (0, 5)
        ],
    ),
    "longformer": (
        nn.LongformerAttention,
        [
            {"window": window, "stride": stride, "global_tokens": lead}
            for window in (1, 6)
            for stride in (1, 3)
            for lead in (0, 1, 11)
        ],
    ),
    "cca": (
        nn.CoreContextAttention,
        [
            {"group": group, "window": window, "mass": True}
            for group, window in itertools.product((1, 3, 4, 60), (1, 4, 7, 80))
        ],
    ),
    "dga": (
        nn.DynamicGroupAttention,
        [
            {"focal": focal, "group": group, "block": block, "look": look, "mass": True}
            for focal, group in itertools.product((0.0, 0.3, 1.0), (1, 3, 60))
            for block, look in ((1, 3), (8, 3), (8, 12), (80, 2))
        ],
    ),
    "nsa": (
        nn.NativeSparseAttention,
        [
            {"length": length, "stride": stride, "select": 4, "blocks": 3, "window": window, "fusion": fusion}
            for length, stride in ((4, 2), (4, 4), (6, 2), (60, 4), (1, 1))
            for window in (1, 5, 80)
            for fusion in ("gates", "one")
        ],
    ),
}


def made(kind: type[SelfAttention], /, **options: Any) -> SelfAttention:
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, 2, **options).double()


def text(tokens: int = TOKENS, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def read(module: SelfAttention, states: Tensor, cuts: list[int], state: State | None = None) -> tuple[Tensor, State]:
    """Outputs of a text that is read in parts of these lengths."""
    outs = []
    for part in states.split(cuts, 1):
        out, state = module.step(part, state)
        outs.append(out)
    assert state is not None
    return torch.cat(outs, 1), state


def bytes_of(state: State) -> int:
    """Bytes of the storages that a state holds on to."""
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in state.kept.values()}
    return sum(held.values())


EVERY = [(name, options) for name, (_, sizes) in SIZES.items() for options in sizes]


@pytest.mark.parametrize(("name", "options"), EVERY)
@torch.no_grad()
def test_cuts_do_not_matter(name: str, options: dict[str, Any]) -> None:
    module, states = made(SIZES[name][0], **options), text()
    whole = module(states)
    for cuts in ([1] * TOKENS, [9, 1, 1, 0, 20, 22], [TOKENS - 3, 1, 2]):
        torch.testing.assert_close(read(module, states, cuts)[0], whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", list(SIZES))
@torch.no_grad()
def test_a_state_goes_on_twice_and_its_rows_in_another_order(name: str) -> None:
    module, states = made(SIZES[name][0], **SIZES[name][1][0]), text()
    whole = module(states)
    _, before = read(module, states[:, :31], [31])
    torch.testing.assert_close(read(module, text(9, seed=2), [1] * 9, before)[0].shape, states[:, :9].shape)
    torch.testing.assert_close(read(module, states[:, 31:], [22], before)[0], whole[:, 31:], atol=1e-10, rtol=0)
    turned = State({part: kept[[1, 0, 1]] for part, kept in before.kept.items()}, before.tokens)
    out, _ = read(module, states[[1, 0, 1], 31:], [1] * 22, turned)
    torch.testing.assert_close(out, whole[[1, 0, 1], 31:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("cuts", [[160], [1] * 160, [7] * 22 + [6]], ids=["at once", "by token", "by part"])
@torch.no_grad()
def test_only_what_may_be_read_is_kept(cuts: list[int]) -> None:
    entry = 2 * 2 * 4 * 8  # bytes of the keys and values of one token
    _, state = read(made(nn.CoreContextAttention, group=8, window=20), text(160, rows=1), cuts)
    assert bytes_of(state) <= (160 // 8 + 20 + 8) * entry
    _, state = read(made(nn.NativeSparseAttention, length=16, stride=8, window=20), text(160, rows=1), cuts)
    assert bytes_of(state) <= (160 + 160 // 8 + 16 + 20) * entry
    _, state = read(made(nn.DynamicGroupAttention, focal=0.25, group=8, block=32, look=6), text(160, rows=1), cuts)
    assert (
        bytes_of(state) <= (160 + 160 // 4 + 120 // 8 + 8 + 6 + 32) * entry
    )  # a query has as much as a key and a value
    for kind, near in (("sliding", 20), ("dilated", 60), ("blockwise", 25)):
        module = made(nn.LocalAttention, kind=kind, window=20, stride=3, exchange=5, global_tokens=2)
        _, state = read(module, text(160, rows=1), cuts)
        assert bytes_of(state) <= (near + 2) * entry

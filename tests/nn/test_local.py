"""Local kinds against dense attention under a mask that is written out pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgam.nn import LocalAttention

WIDTH, HEADS, KV_HEADS = 16, 4, 2
WINDOW, STRIDE, EXCHANGE = 5, 3, 2


def reads(kind: str, query: int, key: int, window: int) -> bool:
    """The pattern as it is told, without causality and global tokens."""
    distance = abs(query - key)
    if kind == "dilated":
        return distance in range(0, window * STRIDE, STRIDE)
    if kind == "blockwise":
        block = range(query - query % window, query - query % window + window)
        return key in range(block.start - EXCHANGE, block.stop + EXCHANGE)
    return distance < window or (kind == "strided" and key in range(0, key + 1, STRIDE))


def mask(kind: str, tokens: int, window: int, lead: int, causal: bool) -> Tensor:
    """(T, T): which query reads which key."""
    seen = torch.tensor(
        [[key < lead or reads(kind, query, key, window) for key in range(tokens)] for query in range(tokens)]
    )
    if causal:
        return seen.tril()
    seen[:lead] = True
    return seen


@pytest.mark.parametrize("tokens", [1, 4, 23, 150])
@pytest.mark.parametrize("lead", [0, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["sliding", "strided", "dilated", "blockwise"])
@torch.no_grad()
def test_equals_masked_dense_attention(kind: str, causal: bool, lead: int, tokens: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(2, tokens, WIDTH, dtype=torch.float64)
    for window in (1, WINDOW):
        sizes = {"window": window, "stride": STRIDE, "exchange": min(EXCHANGE, window), "global_tokens": lead}
        if kind == "blockwise" and window < EXCHANGE:
            continue
        module = LocalAttention(WIDTH, HEADS, KV_HEADS, kind=kind, causal=causal, **sizes).double()  # type: ignore[arg-type]
        q, k = (module.turned(module.split(part(states)), 0) for part in (module.query, module.key))
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, module.split(module.value(states))))
        logits = (module.dim**-0.5 * q @ k.mT).masked_fill(~mask(kind, tokens, window, lead, causal), -torch.inf)
        wanted = module.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(module(states), wanted, atol=1e-10, rtol=0)

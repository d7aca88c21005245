"""Dense attention of PyTorch, the yardstick of the same run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgam.benchmarks.machine import Machine, Timing, timed
from mgam.benchmarks.setting import Row, Setting, rated, row_of, states

PEERS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
DENSE_AT_MOST = 1 << 18
"""Longest text that dense attention is timed at; beyond it the quadratic law says the rest, and the row says so."""


def dense_rows(setting: Setting, machine: Machine, tokens: int, backward: bool = False) -> Iterator[Row]:
    """Dense causal attention of PyTorch."""
    phase = "forward + backward" if backward else "prefill"
    timed_at = min(tokens, DENSE_AT_MOST if not backward else DENSE_AT_MOST // 2)
    queries, keys, values = states(setting, timed_at)
    for states_ in (queries, keys, values):
        states_.requires_grad_(backward)
    pull = torch.randn_like(queries) if backward else None
    for name, peer in PEERS.items():

        def call(peer: SDPBackend = peer) -> None:
            with sdpa_kernel(peer):
                out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            if pull is not None:
                torch.autograd.grad(out, (queries, keys, values), pull)

        try:
            time = timed(call, least=2 if timed_at > 1 << 16 else 5)
        except RuntimeError as error:
            yield Row(
                phase,
                "dense",
                name,
                tokens,
                1,
                float("nan"),
                0,
                0,
                0,
                note=f"refused: {str(error).splitlines()[0][:120]}",
            )
            continue
        more = (tokens / timed_at) ** 2
        time = Timing(time.median * more, time.fastest * more, time.slowest * more, time.repeats)
        note = "" if more == 1 else f"extrapolated from {timed_at} tokens"
        flop = 4 * setting.dim * setting.query_heads * tokens * (tokens + 1) / 2 * (3.5 if backward else 1)
        yield rated(row_of(phase, "dense", name, tokens, 1, time, note), machine, flop, 0, (tokens + 1) / 2)

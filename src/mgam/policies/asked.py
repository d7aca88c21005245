"""A search as the device takes it: which voters ask which search keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgam.lasting import lasting

if TYPE_CHECKING:
    from mgam.policies.one_token_triton import Now


@dataclass(frozen=True)
class Asked:
    """What a search asks of which keys.

    Shapes (N blocks, H KV heads, M = G*V voters): queries (N, H, M, d) and search (B, H, S, C, d) of one dtype;
    factor (N, H, M)
    turns products into logits in base 2 (None: `scale` does, for all of them); live (N, V) says which voters count; row
    and visible (N,): the row of each block and how many of its chunks may be judged.
    """

    queries: Tensor
    factor: Tensor | None
    live: Tensor
    search: Tensor
    row: Tensor
    visible: Tensor
    basis: Tensor | None = None
    step: Tensor | None = None
    scale: float = 1.0
    """Few voters come whole, in the dimensions D of their head, for a kernel that shortens them as it asks: by a basis
    (B, H, D, d) and the step of the keys (B, H); then `factor` is `scale` times that step and the voter's own."""
    now: Now | None = None
    """One new token per row: tables that this search writes before anything else reads them, `live`, `row` and
    `visible` among them."""


def flat(
    queries: Tensor, live: Tensor, search: Tensor, row: Tensor, visible: Tensor, scale: float, alike: bool = False
) -> Asked:
    """The search over full keys. `queries` (N, H*G, V, D) as voters come. `alike`: for a kernel that takes the factor
    of all voters as a number."""
    count, query_heads, votes, dim = queries.shape
    heads = search.shape[1]
    folded = queries.reshape(count, heads, query_heads // heads * votes, dim).to(search.dtype).contiguous()
    if alike:
        return Asked(folded, None, live, search, row, visible, scale=scale * math.log2(math.e))
    made = _all_alike.__wrapped__ if queries.is_cuda and torch.cuda.is_current_stream_capturing() else _all_alike
    factor = made(tuple(folded.shape[:3]), scale * math.log2(math.e), queries.device)
    return Asked(folded, factor, live, search, row, visible)


@lru_cache(maxsize=8)
@lasting()
def _all_alike(shape: tuple[int, ...], value: float, device: torch.device) -> Tensor:
    """A tensor of one number, made once for all layers; nothing writes to it. A graph that is captured has its own."""
    return torch.full(shape, value, dtype=torch.float32, device=device)


def plain_scores(asked: Asked, chunks: int) -> Tensor:
    """Mass (N, H, chunks) that the voters give each chunk, in float32, on any device: the oracle of the kernels."""
    assert asked.factor is not None
    dtype = (
        torch.promote_types(torch.float32, asked.queries.dtype) if asked.queries.element_size() > 1 else torch.float32
    )
    hidden = torch.arange(chunks, device=asked.row.device)[None] >= asked.visible[:, None]
    found = torch.zeros(*asked.queries.shape[:2], chunks, dtype=dtype, device=asked.row.device)
    for block, row in enumerate(asked.row.tolist()):
        keys = asked.search[row, :, :, :chunks].to(dtype)
        best = (
            (asked.queries[block].to(dtype) @ keys.flatten(1, 2).transpose(1, 2))
            .unflatten(-1, keys.shape[1:3])
            .amax(-2)
        )
        logits = (best * asked.factor[block, ..., None] * math.log(2.0)).masked_fill(hidden[block], -torch.inf)
        mass = torch.softmax(logits, -1).nan_to_num(0.0).unflatten(1, (-1, asked.live.shape[1]))
        found[block] = (mass * asked.live[block][None, None, :, None]).sum((1, 2))
    return found

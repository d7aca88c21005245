"""How much attention each key gets from many queries, without writing the weights out."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgam.kernels import cdiv, power_of_2

TILE = 64
"""Queries, and keys, of a tile."""


def masses(queries: Tensor, first: int, keys: Tensor, scale: float) -> Tensor:
    """Causal softmax weights that each key gets, (R, H, n) float32, summed over queries and the heads of a group.

    Shapes: queries (R, H*G, m, D) stand at places `first` and on, keys (R, H, n, D) at places 0 and on.
    """
    rows, query_heads, count, dim = queries.shape
    heads, places = keys.shape[1], keys.shape[2]
    queries, keys = queries.contiguous(), keys.contiguous()
    level = torch.empty(rows, query_heads, count, dtype=torch.float32, device=keys.device)
    found = torch.empty(rows, query_heads, places, dtype=torch.float32, device=keys.device)
    given = (queries, keys, level, found, first, count, places, scale * math.log2(math.e))
    precision = "ieee" if queries.dtype == torch.float32 else "tf32"
    for kernel, length in ((level_kernel, count), (mass_kernel, places)):
        kernel[(cdiv(length, TILE), rows * query_heads)](
            *given, G=query_heads // heads, D=dim, TILE=TILE, BLOCK_D=max(16, power_of_2(dim)),
            PRECISION=precision, num_warps=4,
        )  # fmt: skip
    return found.unflatten(1, (heads, -1)).sum(2)


@triton.jit
def _states(ptr, place, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """States (TILE, D) at some of `count` places; zeros beyond them."""
    dim = tl.arange(0, BLOCK_D)
    return tl.load(ptr + place[:, None] * D + dim[None], mask=(place < count)[:, None] & (dim < D)[None], other=0.0)


@triton.jit(do_not_specialize=["first", "count", "places"])
def level_kernel(
    q_ptr, k_ptr, level_ptr, mass_ptr, first, count, places, scale,
    G: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log to base 2 of the sum of each query's exponentials, for one tile of queries of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1).to(tl.int64)
    query = tile * TILE + tl.arange(0, TILE)
    q = _states(q_ptr + head * count * D, query, count, D, BLOCK_D)
    highest = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for low in tl.range(0, tl.minimum(places, first + (tile + 1) * TILE), TILE):
        place = low + tl.arange(0, TILE)
        k = _states(k_ptr + head // G * places * D, place, places, D, BLOCK_D)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = (place[None] <= first + query[:, None]) & (place < places)[None]
        logit = tl.where(seen, logit, -float("inf"))
        higher = tl.maximum(highest, tl.max(logit, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(logit - higher[:, None]), 1)
        highest = higher
    tl.store(level_ptr + head * count + query, highest + tl.log2(total), mask=query < count)


@triton.jit(do_not_specialize=["first", "count", "places"])
def mass_kernel(
    q_ptr, k_ptr, level_ptr, mass_ptr, first, count, places, scale,
    G: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights that one tile of keys gets from the queries of one head."""
    low_key = tl.program_id(0) * TILE
    head = tl.program_id(1).to(tl.int64)
    place = low_key + tl.arange(0, TILE)
    k = _states(k_ptr + head // G * places * D, place, places, D, BLOCK_D)
    mass = tl.zeros((TILE,), tl.float32)
    for low in tl.range(tl.maximum(low_key - first, 0) // TILE * TILE, count, TILE):
        query = low + tl.arange(0, TILE)
        q = _states(q_ptr + head * count * D, query, count, D, BLOCK_D)
        level = tl.load(level_ptr + head * count + query, mask=query < count, other=float("inf"))
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = place[None] <= first + query[:, None]
        weight = tl.exp2(logit - level[:, None])
        mass += tl.sum(tl.where(seen & (weight == weight), weight, 0.0), 0)  # a query that is no number counts nothing
    tl.store(mass_ptr + head * places + place, mass, mask=place < places)

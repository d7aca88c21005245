"""One new token per row by kernels alone: nothing waits for the device, so that a CUDA graph can hold the call.

This is how the engine reads one new token per row (`mgam.step`). What more it knows of a call it plans on the CPU, from
lengths that it knows there; this call takes lengths from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mgam.attend.triton.forward import read
from mgam.attend.triton.lists import Lists, now, places
from mgam.attend.triton.masses import masses
from mgam.attend.triton.tables import Turn
from mgam.cover import Cover
from mgam.policies.asked import flat
from mgam.policies.compact import CompactKeys
from mgam.policies.scored import Scored
from mgam.policies.search_triton import cover_of
from mgam.positions import Positions
from mgam.pyramid import Pyramid


@dataclass(frozen=True)
class Decoded:
    """Attention (B, H*G, 1, D) of one new token per row; what it read, and the tables that turned it, which must last
    as long as a graph of the call."""

    out: Tensor
    cover: Cover
    turn: Turn
    mass: Tensor | None
    """(B, H, K): the attention that opened chunks got, where it was asked for."""


def decode(
    queries: Tensor,
    lengths: Tensor,
    pyramid: Pyramid,
    policy: Scored,
    positions: Positions,
    scale: float,
    *,
    chunks: int,
    softcap: float | None = None,
    watched: bool = False,
) -> Decoded:
    """One new token per row: queries (B, H*G, 1, D); lengths (B,) on the device, the token included.

    `chunks` bounds the chunks of any row. All shapes are static and nothing waits for the device, so that the call can
    be captured in a CUDA graph and replayed while `lengths` and the pyramid's buffers change. The compact keys, where
    the policy has them, must have been made before; they are searched when every row holds the tokens that give its
    basis.
    """
    levels = pyramid.levels
    blocks, live = now(lengths, policy.window, levels)
    chosen = choose(queries, (blocks, live), pyramid, policy, chunks)
    index = (chosen.opened, *chosen.summaries)
    counts, ranks = chosen.placed or places(index, levels, positions.kind == "granular")
    lists = Lists(levels, blocks[:4], 1, index, counts, ranks, chosen.mass)
    turn = Turn.of(positions, lists, chunks * levels.chunk, queries.device, queries.dtype)
    part = read(
        queries, lists, pyramid.keys, pyramid.values, scale, turn=turn, softcap=softcap,
        tickets=queries.new_zeros(queries.shape[0], 8, dtype=torch.int32),
    )
    mass = None
    if watched:
        mass = masses(queries, lists, pyramid.keys[0], part.lse, scale, turn=turn, softcap=softcap)
    return Decoded(part.out, chosen, turn, mass)


def choose(queries: Tensor, when: tuple[Tensor, Tensor], pyramid: Pyramid, policy: Scored, chunks: int) -> Cover:
    """Covers of one new token per row: queries (B, H*G, 1, D); `when` as `mgam.attend.triton.lists.now` gives it."""
    (rows, _, _, start, visible), live = when
    scale = policy.scale if policy.scale is not None else queries.shape[-1] ** -0.5
    if policy.compact is not None and min(pyramid.lengths) > policy.compact.calibrate:
        keys = CompactKeys.of(pyramid, pyramid.levels, policy.compact)
        asked = keys.asked(queries, live, rows, visible, scale)
    else:
        assert pyramid.search is not None
        asked = flat(queries, live, pyramid.search, rows, visible, scale)
    most = policy.budget // pyramid.levels.chunk
    return cover_of(asked, chunks, start, pyramid.levels, most, rest=policy.rest, mass=policy.mass)

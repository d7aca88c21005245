"""One new token per row by kernels alone: nothing waits for the device, so that a CUDA graph can hold the call.

This is how the engine reads one new token per row (`mgam.step`). What more it knows of a call it plans on the CPU, from
lengths that it knows there; this call takes lengths from the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mgam.attend.triton.forward import read
from mgam.attend.triton.lists import Lists, places
from mgam.attend.triton.masses import masses
from mgam.attend.triton.tables import Turn
from mgam.cover import Cover
from mgam.policies.asked import flat
from mgam.policies.compact import CompactKeys
from mgam.policies.one_token_triton import Now
from mgam.policies.scored import Scored
from mgam.policies.search_triton import cover_of, few
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
    place: Tensor | None = None,
) -> Decoded:
    """One new token per row: queries (B, H*G, 1, D); lengths (B,) on the device, the token included.

    `chunks` bounds the chunks of any row. All shapes are static and nothing waits for the device, so that the call can
    be captured in a CUDA graph and replayed while `lengths` and the pyramid's buffers change. The compact keys, where
    the policy has them, must have been made before; they are searched when every row holds the tokens that give its
    basis. `place` (1,) int64: the address of a contiguous tensor like the queries that gets the result; then `out` need
    not.
    """
    levels = pyramid.levels
    now = Now.of(lengths, policy.window, levels, pyramid.keys[0].shape[1])
    chosen = choose(queries, now, pyramid, policy, chunks)
    index = (chosen.opened, *chosen.summaries)
    counts, ranks = chosen.placed or places(index, levels, positions.kind == "granular")
    lists = Lists(levels, now.table[:4], 1, index, counts, ranks, chosen.mass)
    turn = Turn.of(positions, lists, chunks * levels.chunk, queries.device, queries.dtype)
    states = pyramid.keys, pyramid.values
    part = read(queries, lists, *states, scale, turn=turn, softcap=softcap, tickets=now.tickets, place=place)
    mass = None
    if watched:
        mass = masses(queries, lists, pyramid.keys[0], part.lse, scale, turn=turn, softcap=softcap)
    return Decoded(part.out, chosen, turn, mass)


def choose(queries: Tensor, now: Now, pyramid: Pyramid, policy: Scored, chunks: int) -> Cover:
    """Covers of one new token per row: queries (B, H*G, 1, D). Writes the tables of `now`."""
    row, _, _, start, visible = now.table
    scale = policy.scale if policy.scale is not None else queries.shape[-1] ** -0.5
    assert pyramid.search is not None
    rows, heads = pyramid.search.shape[:2]
    keys = None
    if policy.compact is not None and min(pyramid.lengths) > policy.compact.calibrate:
        keys = CompactKeys.of(pyramid, pyramid.levels, policy.compact)
    # The search writes the tables on its way where nothing is launched before its first kernel.
    first = chunks > 0 and few(queries.shape[0], queries.shape[1] // heads, rows)
    first = first and (keys is None or keys.on_device(queries))
    if not first:
        now.write()
    if keys is None:
        asked = flat(queries, now.live, pyramid.search, row, visible, scale, alike=first)
    else:
        asked = keys.asked(queries, now.live, row, visible, scale)
    asked = replace(asked, now=now if first else None)
    most = policy.budget // pyramid.levels.chunk
    return cover_of(asked, chunks, start, pyramid.levels, most, rest=policy.rest, mass=policy.mass)

"""Prefill: build, search and read apart, and the whole, over one text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mgam.attend.triton.forward import read
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import Turn
from mgam.benchmarks.machine import Machine, timed
from mgam.benchmarks.setting import Row, Setting, blocks_of, built, in_blocks, rated, row_of, states
from mgam.cover import Cover
from mgam.device import choose, prefill
from mgam.policies.compact import CompactKeys
from mgam.policies.fixed import Window
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks


def prefill_rows(setting: Setting, machine: Machine, tokens: int, parts: bool = True) -> Iterator[Row]:
    """Build, search, read and the whole, over one text."""
    queries, keys, values = states(setting, tokens)
    scale = setting.dim**-0.5
    policy, positions = setting.policy, setting.placed
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def whole() -> Tensor:
        return prefill(queries, built(setting, keys, values), policy, positions, scale, block=setting.block)

    whole()
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9
    row = row_of("prefill", "build + search + read", "mgam triton", tokens, 1, timed(whole))
    yield replace(row, memory_gb=memory)
    if not parts:
        return
    kv_bytes = 2 * keys.numel() * keys.element_size()
    time = timed(lambda: built(setting, keys, values))
    yield rated(
        row_of("prefill", "build", "mgam triton, copy into the cache included", tokens, 1, time),
        machine,
        0,
        2 * kv_bytes,
    )
    pyramid = built(setting, keys, values)
    if policy.compact is not None:

        def shorten() -> None:
            pyramid.derived.clear()
            CompactKeys.of(pyramid, pyramid.levels, policy.compact)  # type: ignore[arg-type]

        yield row_of("prefill", "compact keys", "torch", tokens, 1, timed(shorten))
    blocks, cut = blocks_of(tokens, setting.block), in_blocks(queries, setting.block)
    step = max(1, (1 << 26) // (setting.kv_heads * max(1, tokens // setting.sizes[1])))
    pieces = [slice(first, min(first + step, len(blocks))) for first in range(0, len(blocks), step)]
    time = timed(lambda: [choose(cut[piece], blocks[piece], pyramid, policy) for piece in pieces])
    width = setting.dims if policy.compact else setting.dim
    flop = 2 * setting.query_heads * (tokens / setting.every) * (tokens / 8) * width
    name = f"mgam triton, every {setting.every}, {width} dims, {setting.bits} bits"
    yield rated(row_of("prefill", "search", name, tokens, 1, time, "rate on one pass of products"), machine, flop, 0)
    covers = [(piece, choose(cut[piece], blocks[piece], pyramid, policy)) for piece in pieces]
    time = timed(lambda: [Lists.of(cover, blocks[piece], queries.device, positions) for piece, cover in covers])
    yield row_of("prefill", "lists and ranks", "torch", tokens, 1, time)
    yield read_row(setting, machine, tokens, cut, pyramid, blocks, covers, "read")


def read_row(
    setting: Setting,
    machine: Machine,
    tokens: int,
    cut: Tensor,
    pyramid: Pyramid,
    blocks: Blocks,
    covers: list[tuple[slice, Cover]],
    part: str,
) -> Row:
    """Reading given covers."""
    positions = setting.placed
    lists = [(piece, Lists.of(cover, blocks[piece], cut.device, positions)) for piece, cover in covers]
    out = torch.empty_like(cut)

    def call() -> None:
        for piece, found in lists:
            turn = Turn.of(positions, found, pyramid.tokens, cut.device)
            read(cut[piece], found, pyramid.keys, pyramid.values, setting.dim**-0.5, turn=turn, out=out[piece])

    entries = sum(sum(cover.entries_per_level(blocks[piece])) for piece, cover in covers)
    flop = 4 * setting.dim * setting.query_heads * entries
    row = row_of("prefill", part, f"mgam triton, {setting.positions} positions", tokens, 1, timed(call))
    return rated(row, machine, flop, 0, entries / tokens)


def window_row(setting: Setting, machine: Machine, tokens: int) -> Row:
    """Sink and window alone: nothing that reads them can be faster."""
    queries, keys, values = states(setting, tokens)
    pyramid = built(setting, keys, values)
    blocks = blocks_of(tokens, setting.block)
    cover = Window(setting.window).choose(None, blocks, pyramid, setting.levels)
    return read_row(
        setting,
        machine,
        tokens,
        in_blocks(queries, setting.block),
        pyramid,
        blocks,
        [(slice(0, len(blocks)), cover)],
        "window, lower bound",
    )

"""Prefill: build, search and read apart, and the whole, over one text, by the engine that models call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mgam import engine
from mgam.attend.triton.forward import read
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import Turn
from mgam.benchmarks.machine import Machine, timed
from mgam.benchmarks.setting import (
    Row,
    Setting,
    blocks_of,
    both,
    built,
    chosen,
    in_blocks,
    plan_of,
    rated,
    reading_of,
    row_of,
    states,
)  # fmt: skip
from mgam.cover import Cover
from mgam.engine import Reading
from mgam.policies.compact import CompactKeys
from mgam.policies.fixed import Window
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

BLOCKS = 256
"""Blocks chosen for at a time."""


def prefill_rows(setting: Setting, machine: Machine, tokens: int) -> Iterator[Row]:
    """The whole and its reading, by positions of both kinds, and what comes before reading, over one text."""
    queries, keys, values = states(setting, tokens)
    scale = setting.dim**-0.5
    policy = setting.policy
    plan = plan_of(setting, tokens)  # a model's layers share it
    for placed in both(setting):
        reading = reading_of(placed)

        def whole(reading: Reading = reading) -> Tensor:
            return engine.read(queries, built(setting, keys, values), plan, reading, scale)

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        whole()
        memory = (torch.cuda.max_memory_allocated() - before) / 1e9
        kernel = f"mgam engine, triton, {placed.positions} positions"
        yield replace(row_of("prefill", "build + search + read", kernel, tokens, 1, timed(whole)), memory_gb=memory)
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
    cuts = [slice(first, min(first + BLOCKS, len(blocks))) for first in range(0, len(blocks), BLOCKS)]
    pieces = [(piece, blocks[piece]) for piece in cuts]
    time = timed(lambda: [chosen(cut[piece], some, pyramid, policy) for piece, some in pieces])
    width = setting.dims if policy.compact else setting.dim
    flop = 2 * setting.query_heads * (tokens / setting.every) * (tokens / 8) * width
    name = f"mgam triton, every {setting.every}, {width} dims, {setting.bits} bits"
    yield rated(
        row_of("prefill", "search", name, tokens, 1, time, "one pass of products, covers and ranks included"),
        machine,
        flop,
        0,
    )
    covers = [(piece, some, chosen(cut[piece], some, pyramid, policy)) for piece, some in pieces]
    for placed in both(setting):
        yield read_row(placed, machine, tokens, cut, pyramid, covers, "read")


def read_row(
    setting: Setting,
    machine: Machine,
    tokens: int,
    cut: Tensor,
    pyramid: Pyramid,
    covers: list[tuple[slice, Blocks, Cover]],
    part: str,
) -> Row:
    """Reading given covers."""
    positions = setting.placed
    lists = [(piece, Lists.of(cover, blocks, cut.device, positions)) for piece, blocks, cover in covers]
    out = torch.empty_like(cut)

    def call() -> None:
        for piece, found in lists:
            turn = Turn.of(positions, found, pyramid.tokens, cut.device)
            read(cut[piece], found, pyramid.keys, pyramid.values, setting.dim**-0.5, turn=turn, out=out[piece])

    entries = sum(sum(cover.entries_per_level(blocks)) for _, blocks, cover in covers)
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
        [(slice(0, len(blocks)), blocks, cover)],
        "window, lower bound",
    )

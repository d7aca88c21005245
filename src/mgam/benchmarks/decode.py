"""Decode: one new token per row, by the engine, and by its kernels alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from mgam import engine
from mgam.attend.triton.forward import read
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import Turn
from mgam.benchmarks.dense import PEERS
from mgam.benchmarks.machine import Machine, graphed, timed
from mgam.benchmarks.setting import Row, Setting, built, rated, reading_of, row_of, states
from mgam.cover import Cover, dense_cover
from mgam.device import choose, decode
from mgam.plan import Plan
from mgam.policies import Scored
from mgam.policies.compact import CompactKeys
from mgam.policies.one_token_triton import Now
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Schedule


def decode_rows(setting: Setting, machine: Machine, tokens: int, batch: int) -> Iterator[Row]:
    """One new token per row, rows of slightly different lengths: calls of the engine in a row, and what they keep the
    device busy with (one CUDA graph); dense attention in both ways."""
    queries, keys, values = states(setting, tokens, batch, 1)
    pyramid = built(setting, keys, values)
    policy, positions, scale = setting.policy, setting.placed, setting.dim**-0.5
    if policy.compact is not None:
        CompactKeys.of(pyramid, pyramid.levels, policy.compact)
    chunks = tokens // setting.sizes[1]
    lengths = torch.tensor([tokens - 7 * row for row in range(batch)], device="cuda")
    entry = 2 * setting.dim * 2 * setting.kv_heads

    def call() -> Tensor:
        return decode(queries, lengths, pyramid, policy, positions, scale, chunks=chunks).out

    time = timed(graphed(call), most=200)
    yield row_of("decode", "search + read", "mgam kernels, CUDA graph", tokens, batch, time)
    before = (lengths - 1).tolist()
    plan, reading = Plan.of([Schedule.uniform(1)] * batch, before, [1] * batch, 1, 0), reading_of(setting)
    with torch.no_grad():
        time = timed(lambda: engine.read(queries, pyramid, plan, reading, scale), most=200, warm=3)
    yield row_of("decode", "search + read", "mgam engine", tokens, batch, time)
    blocks = Blocks(
        torch.arange(batch),
        lengths.cpu() - 1,
        torch.ones(batch, dtype=torch.int64),
        lengths.cpu() - 1,
        lengths.cpu() - 1,
        lengths.cpu(),
        1,
        1,
    )
    covers = {"dense": dense_cover(blocks, setting.kv_heads, setting.levels, queries.device)}
    if tokens > 4 * setting.budget:
        covers["read"] = _decode_cover(queries, lengths, blocks, pyramid, policy, chunks)
    for part, cover in covers.items():
        place = positions if part == "read" else Positions()
        lists = Lists.of(cover, blocks, queries.device, place)
        turn = Turn.of(place, lists, tokens, queries.device, queries.dtype)
        time = timed(
            graphed(partial(read, queries, lists, pyramid.keys, pyramid.values, scale, turn=turn)),
            most=200,
        )
        entries = sum(cover.entries_per_level(blocks))
        row = row_of("decode", part, "mgam triton, CUDA graph", tokens, batch, time)
        yield rated(row, machine, 4 * setting.dim * setting.query_heads * entries, entries * entry, entries / batch)
    folded = queries.view(batch, setting.kv_heads, -1, setting.dim)
    for name, peer in PEERS.items():

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(folded, keys, values)

        try:
            with sdpa_kernel(peer):
                times = {name: timed(graphed(dense), most=100), f"{name}, call by call": timed(dense, most=100)}
        except RuntimeError as error:
            yield Row(
                "decode",
                "dense",
                name,
                tokens,
                batch,
                float("nan"),
                0,
                0,
                0,
                note=f"refused: {str(error).splitlines()[0][:120]}",
            )
            continue
        entries = float(tokens * batch)
        for called, time in times.items():
            row = row_of("decode", "dense", called, tokens, batch, time)
            yield rated(row, machine, 0, entries * entry, float(tokens))


def _decode_cover(
    queries: Tensor, lengths: Tensor, blocks: Blocks, pyramid: Pyramid, policy: Scored, chunks: int
) -> Cover:
    now = Now.of(lengths, policy.window, pyramid.levels, pyramid.keys[0].shape[1])
    return choose(queries, now, pyramid, policy, chunks)

"""Forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from mgam.attend.triton.autograd import Read
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import Turn
from mgam.benchmarks.machine import Machine, timed
from mgam.benchmarks.setting import Row, Setting, blocks_of, chosen, in_blocks, row_of, states
from mgam.pyramid import Pyramid


def training_rows(setting: Setting, machine: Machine, tokens: int) -> Iterator[Row]:
    """Build, search, read, and gradients of queries, keys and values."""
    torch.cuda.reset_peak_memory_stats()
    call = training_step(setting, tokens)
    before = torch.cuda.memory_allocated()
    call()
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9
    kernel = f"mgam triton, {setting.positions} positions"
    row = row_of("forward + backward", "build + search + read", kernel, tokens, 1, timed(call, least=3))
    yield replace(row, memory_gb=memory)


def training_step(setting: Setting, tokens: int) -> Callable[[], None]:
    """A call that goes forward and back over one text."""
    queries, keys, values = states(setting, tokens)
    policy, positions, scale = setting.policy, setting.placed, setting.dim**-0.5
    blocks = blocks_of(tokens, setting.block)
    for states_ in (queries, keys, values):
        states_.requires_grad_(True)
    pull = torch.randn_like(in_blocks(queries, setting.block))

    def call() -> None:
        pyramid = Pyramid.of(keys, values, setting.levels)
        cut = in_blocks(queries, setting.block)
        with torch.no_grad():
            cover = chosen(cut, blocks, pyramid, policy)
            lists = Lists.of(cover, blocks, cut.device, positions)
        turn = Turn.of(positions, lists, tokens, cut.device)
        out = Read.apply(cut, lists, turn, scale, None, *pyramid.keys, *pyramid.values)
        torch.autograd.grad(out, (queries, keys, values), pull)

    return call

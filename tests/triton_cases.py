"""Small odd cases for the kernels, shared by their tests: fresh random data, NaN wherever nothing may be read."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mgam.attend import reference
from mgam.cover import Cover, cover_of, dense_cover, window_start
from mgam.levels import Levels
from mgam.merge import Part
from mgam.positions import Positions, Rotary
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Schedule

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
MANY = 6
"""Blocks of a case that Triton's interpreter reads: the first two, and the last ones."""
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)

needs_triton = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs triton and a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter",
)


def poisoned(states: Tensor, more: int) -> Tensor:
    """The same states in a buffer with `more` rows of NaN at the end of the third axis, seen without them."""
    shape = list(states.shape)
    axis = 2
    shape[axis] += more
    buffer = torch.full(shape, torch.nan, dtype=states.dtype, device=states.device)
    buffer.narrow(axis, 0, states.shape[axis]).copy_(states)
    return buffer.narrow(axis, 0, states.shape[axis])


@dataclass
class Made:
    """A case, ready to run."""

    queries: Tensor
    blocks: Blocks
    cover: Cover
    pyramid: Pyramid
    positions: Positions
    scale: float
    softcap: float | None

    @property
    def tolerance(self) -> float:
        return {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[self.queries.dtype]

    def compare(self, got: Tensor, want: Tensor) -> None:
        """Relative error in norm; dead rows must be zero."""
        assert got.shape == want.shape
        assert torch.isfinite(got).all(), "not finite"
        error = (got.detach().cpu().double() - want.detach().cpu().double()).norm() / want.double().norm().clamp_min(
            1e-9
        )
        assert error < self.tolerance / 2, f"error {error:.2e} in {got.dtype}"
        dead = torch.arange(got.shape[2])[None] >= self.blocks.length.cpu()[:, None]
        assert not got.detach().cpu().transpose(1, 2)[dead].any()


@dataclass(frozen=True)
class Case:
    """A shape to try: `few` keeps the last few blocks only."""

    batch: int = 1
    heads: int = 2
    group: int = 2
    dim: int = 64
    tokens: int = 130
    lengths: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = (1, 8)
    search: int = 4
    block: int = 16
    window: int = 20
    opened: int = 2
    granular: bool = False
    pairs: int | None = None
    softcap: float | None = None
    mass: bool = True
    rest: str = "summaries"
    dense: bool = False
    few: int | None = None
    sink: bool = True

    def make(self, dtype: torch.dtype, device: str = DEVICE) -> Made:
        """Random states and a random cover of this shape."""
        levels = Levels(self.sizes, self.search)
        lengths = self.lengths or (self.tokens,) * self.batch
        shape = (self.batch, self.heads, self.tokens, self.dim)
        keys, values = torch.randn(shape, device=device), torch.randn(shape, device=device)
        keys[..., 0] += 0.5
        pieces = [
            (row, piece)
            for row, length in enumerate(lengths)
            for piece in Schedule.uniform(self.block).pieces(0, length)
        ]
        if self.few:
            pieces = pieces[-self.few :]
        elif INTERPRETED and len(pieces) > MANY:  # it takes seconds for what a device does at once
            pieces = pieces[:2] + pieces[2 - MANY :]
        blocks = Blocks.of(pieces)
        queries = torch.randn(len(blocks), self.heads * self.group, blocks.size, self.dim, device=device)
        pyramid = Pyramid.of(keys.to(dtype), values.to(dtype), levels, lengths)
        for row, length in enumerate(lengths):
            for level, size in enumerate(levels.sizes):
                pyramid.keys[level][row, :, length // size :] = torch.nan
                pyramid.values[level][row, :, length // size :] = torch.nan
        pyramid.keys = [poisoned(level, 3) for level in pyramid.keys]
        pyramid.values = [poisoned(level, 2) for level in pyramid.values]
        reach = self.window + levels.chunk + self.block
        rotary = Rotary.plain(2 * (self.pairs or self.dim // 2), 4096)
        positions = Positions.granular(rotary, reach) if self.granular else Positions()
        queries = queries.to(dtype)
        cover = dense_cover(blocks, self.heads, levels, torch.device(device))
        if not self.dense:
            start = window_start(blocks.decide, self.window, levels).to(device)
            chunks = int(start.max()) // levels.chunk
            score = torch.rand(len(blocks), self.heads, chunks, device=device)
            few = min(self.opened, chunks)
            mask = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(few, -1).indices, True)
            cover = cover_of(mask, start, levels, rest=self.rest, mass=self.mass, sink=self.sink)
        return Made(queries, blocks, cover, pyramid, positions, self.dim**-0.5, self.softcap)


def in_float64(made: Made) -> Made:
    """The same case on the CPU in float64."""
    pyramid = Pyramid(made.pyramid.levels)
    pyramid.lengths = list(made.pyramid.lengths)
    pyramid.keys = [level.detach().cpu().double() for level in made.pyramid.keys]
    pyramid.values = [level.detach().cpu().double() for level in made.pyramid.values]
    cover = replace(
        made.cover,
        window_start=made.cover.window_start.cpu(),
        opened=made.cover.opened.cpu(),
        summaries=tuple(index.cpu() for index in made.cover.summaries),
    )
    return replace(made, queries=made.queries.detach().cpu().double(), pyramid=pyramid, cover=cover)


def oracle(made: Made) -> Part:
    """The reference, in float64."""
    wide = in_float64(made)
    return reference.attend(
        wide.queries, wide.blocks, wide.cover, wide.pyramid, wide.positions, wide.scale, wide.softcap
    )

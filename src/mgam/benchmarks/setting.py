"""What is timed, what a figure is, and the states that all figures start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from mgam.benchmarks.machine import Machine, Timing
from mgam.cover import Cover
from mgam.engine import Reading
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies import Scored, Voters
from mgam.policies.compact import Compact
from mgam.positions import Positions, Rotary
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Schedule


@dataclass(frozen=True)
class Setting:
    """The shape and the method that are timed."""

    query_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    block: int = 128
    budget: int = 2048
    window: int = 512
    sizes: tuple[int, ...] = (1, 64, 1024)
    every: int = 32
    dims: int = 64
    bits: int = 8
    positions: str = "granular"
    dtype: torch.dtype = torch.bfloat16

    @property
    def policy(self) -> Scored:
        compact = None
        if self.dims < self.dim or self.bits == 8:
            compact = Compact(self.dims, 8 if self.bits == 8 else 16)
        return Scored(self.budget, self.window, every=self.every, compact=compact)

    @property
    def levels(self) -> Levels:
        return Levels(self.sizes)

    @property
    def placed(self) -> Positions:
        if self.positions == "absolute":
            return Positions()
        return Positions.granular(Rotary.plain(self.dim, 32768), self.window + self.block + self.sizes[1])


@dataclass(frozen=True)
class Row:
    """One figure. `part`: what of the work; `kernel`: what really ran; entries: read per query, 0 where that has no
    meaning."""

    phase: str
    part: str
    kernel: str
    tokens: int
    batch: int
    ms: float
    fastest: float
    slowest: float
    repeats: int
    entries: float = 0.0
    tflops: float = 0.0
    matmul_share: float = 0.0
    gbs: float = 0.0
    copy_share: float = 0.0
    memory_gb: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, str | float | int]:
        return asdict(self)


def row_of(phase: str, part: str, kernel: str, tokens: int, batch: int, time: Timing, note: str = "") -> Row:
    """One figure, without rates."""
    return Row(phase, part, kernel, tokens, batch, time.median, time.fastest, time.slowest, time.repeats, note=note)


def rated(row: Row, machine: Machine, flop: float, moved: float, entries: float = 0.0) -> Row:
    """Adds rates on `flop` operations and `moved` bytes, and their shares of the machine's ceilings."""
    tflops, gbs = flop / row.ms / 1e9, moved / row.ms / 1e6
    return replace(
        row,
        entries=entries,
        tflops=tflops,
        matmul_share=tflops / machine.matmul,
        gbs=gbs,
        copy_share=gbs / machine.copy,
    )


def states(setting: Setting, tokens: int, batch: int = 1, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries (B, Hq, Q, D), keys and values (B, H, T, D)."""
    made = [
        torch.randn(batch, heads, count, setting.dim, device="cuda", dtype=setting.dtype)
        for heads, count in (
            (setting.query_heads, queries or tokens),
            (setting.kv_heads, tokens),
            (setting.kv_heads, tokens),
        )
    ]
    return made[0], made[1], made[2]


def built(setting: Setting, keys: Tensor, values: Tensor) -> Pyramid:
    """A pyramid made by one append, as a cache makes it."""
    pyramid = Pyramid(setting.levels)
    pyramid.reserve(keys.shape[2])
    pyramid.append(keys, values)
    return pyramid


def blocks_of(tokens: int, block: int) -> Blocks:
    """Whole blocks of a text that is read for the first time."""
    count = tokens // block
    start = torch.arange(count) * block
    zero, length = torch.zeros(count, dtype=torch.int64), torch.full((count,), block)
    return Blocks(zero, start, length, start, start, start + block, block, block)


def plan_of(setting: Setting, tokens: int) -> Plan:
    """The plan of a text of whole blocks that is read for the first time, each block choosing by its own votes."""
    return Plan.of([Schedule.uniform(setting.block, "block")], [0], [tokens], tokens, 0)


def both(setting: Setting) -> tuple[Setting, Setting]:
    """The setting with positions of both kinds."""
    return replace(setting, positions="granular"), replace(setting, positions="absolute")


def reading_of(setting: Setting) -> Reading:
    """How a layer reads, as the engine takes it."""
    return Reading(setting.policy, setting.levels, setting.placed)


def chosen(cut: Tensor, blocks: Blocks, pyramid: Pyramid, policy: Scored) -> Cover:
    """Covers of blocks that all their queries (N, Hq, Q, D) vote on, as the engine asks for them."""
    live = blocks.once(("live", cut.device), lambda: torch.ones(cut.shape[0], cut.shape[2], device=cut.device).bool())
    return policy.choose(Voters(cut, live), blocks, pyramid, pyramid.levels)


def in_blocks(queries: Tensor, block: int) -> Tensor:
    """Queries (1, Hq, T, D) as blocks (N, Hq, Q, D), a view."""
    return queries.squeeze(0).unflatten(1, (-1, block)).transpose(0, 1)


def guarded(what: str, make: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a part, or one row that says why there are none."""
    try:
        yield from make()
    except Exception as error:  # a benchmark reports what failed and goes on
        yield Row(what, "failed", "", 0, 0, float("nan"), 0, 0, 0, note=f"{type(error).__name__}: {str(error)[:300]}")
    torch.cuda.empty_cache()

"""What a text reads, from queries, keys, values and what a policy searches with, as one differentiable operation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgam.kernels import cdiv, power_of_2
from mgam.lasting import lasting
from mgam.levels import Levels
from mgam.nn.chosen import Chooser, Chosen
from mgam.nn.fused.choice import choose_kernel, gate_kernel
from mgam.nn.fused.reading import read_grad_kernel, read_kernel
from mgam.nn.fused.scores import score_grad_kernel, score_kernel
from mgam.nn.fused.summaries import mean_kernel, spread_mean_kernel
from mgam.nn.scores import FAR

# Shape letters: B rows, T tokens, H KV heads, G query heads per KV head, N blocks of queries, C chunks, D, r.

SCORES = 1 << 27
"""Scores that are in memory at a time."""
BN, BC = 32, 32
"""Blocks and chunks whose scores one program makes."""
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """Entries of a tile, warps, pipeline stages."""

    entries: int = 64
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, Any]:
        """As kernels take them."""
        return {"TILE": self.entries, "num_warps": self.warps, "num_stages": self.stages}


READ, GRADIENT = Tiles(), Tiles()


@dataclass(frozen=True)
class Plan:
    """Everything about a call but its numbers."""

    tokens: int
    block: int
    side: int
    causal: bool
    every: int
    chooser: Chooser
    mass: float
    scale: float

    @property
    def levels(self) -> Levels:
        """Of the pyramid."""
        return self.chooser.levels

    @cached_property
    def blocks(self) -> int:
        """N."""
        return -(-self.tokens // self.block)

    @cached_property
    def chunks(self) -> int:
        """C: those of whole blocks."""
        return self.blocks * self.block // self.levels.chunk

    @property
    def top(self) -> int:
        """Levels of summaries that are read."""
        return self.levels.top if self.chooser.rest == "summaries" else 0

    @cached_property
    def regions(self) -> list[int]:
        """Regions of each level."""
        found = [self.chunks]
        for level in range(2, self.top + 1):
            found.append(-(-found[-1] // self.levels.ratio(level)))
        return found[: self.top]

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Line of each level's first summary."""
        counts = self.regions
        return tuple(sum(counts[:level]) for level in range(len(counts)))

    @cached_property
    def most(self) -> int:
        """Chunks that a block opens at most."""
        return min(self.chooser.budget // self.levels.chunk, self.chunks)

    @cached_property
    def room(self) -> int:
        """Summaries that a block reads at most."""
        return sum(self.chooser.limits(self.chunks)) + self.regions[-1] if self.top else 1

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Chunks in a region of each level."""
        return tuple(self.levels.sizes[level + 1] // self.levels.chunk for level in range(self.top))

    @cached_property
    def geometry(self) -> dict[str, Any]:
        """What kernels know of windows when they are compiled."""
        return {"BLOCK": self.block, "SIDE": self.side, "CAUSAL": self.causal, "CHUNK": self.levels.chunk}

    @cached_property
    def voters(self) -> dict[str, Any]:
        """What kernels know of voters when they are compiled."""
        return {
            **self.geometry, "FAR": FAR, "V": self.block // self.every, "STEP": -1 if self.causal else 1,
            "S": self.levels.search_per_chunk, "BN": BN, "BC": BC,
        }  # fmt: skip

    def segments(self, pairs: int) -> list[tuple[int, int]]:
        """First block and number of blocks whose scores are in memory together."""
        step = max(1, SCORES // max(1, pairs * self.chunks))
        return [(begin, min(step, self.blocks - begin)) for begin in range(0, self.blocks, step)]


@lru_cache(64)
def plan_of(
    tokens: int, block: int, side: int, causal: bool, every: int, chooser: Chooser, mass: float, scale: float
) -> Plan:
    """The plan of these; made once."""
    return Plan(tokens, block, side, causal, every, chooser, mass, scale)


@dataclass(frozen=True)
class Lists:
    """Covers as kernels take them; `choose_kernel` tells what they hold.

    Shapes, int32: fine (B, H, N, most+2), list (B, H, N, room), count (B, H, N, 3).
    """

    fine: Tensor
    list: Tensor
    count: Tensor

    def chosen(self, plan: Plan) -> Chosen:
        """The same covers in the words of the reference."""
        slot = torch.arange(plan.most, device=self.fine.device)
        opened = self.fine[..., : plan.most].long().masked_fill(slot >= self.count[..., :1], -1)
        if not plan.top:
            return Chosen(opened, ())
        place = torch.arange(plan.room, device=self.fine.device)
        lines = sum(plan.regions)
        index = self.list.long().masked_fill(place >= self.count[..., 2:], lines)
        read = torch.zeros(*index.shape[:-1], lines + 1, dtype=torch.bool, device=index.device)
        read.scatter_(-1, index, torch.ones_like(index, dtype=torch.bool))
        return Chosen(opened, tuple(read[..., :lines].split(plan.regions, -1)))


def precision(dtype: torch.dtype) -> str:
    """How products are taken: exactly for float32, which only tests use."""
    return "ieee" if dtype == torch.float32 else "tf32"


def summaries(plan: Plan, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Means (2, B, H, lines, D) of keys and values (B, H, T, D), all levels; their log masses in base 2 (lines,)."""
    rows, heads, tokens, dim = keys.shape
    counts, firsts = plan.regions, plan.firsts
    lines = max(1, sum(counts))
    means = torch.empty(2, rows, heads, lines, dim, dtype=keys.dtype, device=keys.device)
    for level, count in enumerate(counts):
        if level:
            first, count_below = firsts[level - 1], counts[level - 1]
            keys, values = means[:, :, :, first : first + count_below]
            tokens = count_below
        mean_kernel[(count, rows * heads)](
            keys, *keys.stride()[:3], values, *values.stride()[:3], means, heads, tokens, firsts[level], lines,
            rows * heads, RATIO=plan.levels.ratio(level + 1), D=dim, num_warps=4,
        )  # fmt: skip
    return means, _biases(plan, keys.device)


_BIASES: dict[tuple[Any, ...], Tensor] = {}


def _biases(plan: Plan, device: torch.device) -> Tensor:
    key = (plan.levels, plan.mass, tuple(plan.regions), device)
    if key not in _BIASES:
        if len(_BIASES) > 64:
            _BIASES.clear()
        with lasting():
            parts = [
                torch.full((count,), plan.mass * math.log2(plan.levels.sizes[level]), device=device)
                for level, count in enumerate(plan.regions, start=1)
            ]
            _BIASES[key] = torch.cat(parts) if parts else torch.zeros(1, device=device)
    return _BIASES[key]


@dataclass(frozen=True)
class Searched:
    """What a learned policy searches with: ask (B, T/every, H*(r+1)), find (B, C*S, H*r), prior (2*FAR, H), all
    contiguous."""

    ask: Tensor
    find: Tensor
    prior: Tensor


def judged(plan: Plan, searched: Searched, heads: int, begin: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Scores (B, H, n, C) and pulls of what is near (B, H, n) of some blocks."""
    ask, find = searched.ask, searched.find
    rows, dims = len(ask), find.shape[2] // heads
    score = torch.empty(rows, heads, blocks, plan.chunks, dtype=torch.float32, device=ask.device)
    near = torch.empty(rows, heads, blocks, dtype=torch.float32, device=ask.device)
    score_kernel[(cdiv(blocks, BN), cdiv(plan.chunks, BC), rows * heads)](
        ask, find, searched.prior, score, near, heads, begin, blocks, plan.chunks, ask.shape[1], dims**-0.5 * LOG2E,
        R=dims, PRECISION=precision(ask.dtype), num_warps=4, **plan.voters,
    )  # fmt: skip
    return score, near


def choose(plan: Plan, lists: Lists, score: Tensor, near: Tensor | None, begin: int) -> None:
    """Writes the covers of the blocks that scores (B, H, n, C) belong to."""
    rows, heads, blocks, chunks = score.shape
    wide = max(power_of_2(chunks), plan.spans[-1] if plan.top else 1)
    widths = tuple(wide // span for span in plan.spans)
    ratios = tuple(plan.levels.ratio(level) for level in range(2, plan.top + 1))
    choose_kernel[(blocks, rows * heads)](
        score, score if near is None else near, lists.fine, lists.list, lists.count, begin, blocks, plan.blocks,
        chunks, plan.tokens, plan.most, plan.room, plan.chooser.middle, plan.chooser.share or 0.0, plan.firsts,
        TOP=plan.top, RATIOS=ratios, WIDTHS=widths, SHARED=near is not None and plan.chooser.share is not None,
        SUMMARIES=plan.top > 0, CP=wide, num_warps=1 if wide <= 128 else 4 if wide <= 2048 else 8, **plan.geometry,
    )  # fmt: skip


@torch.no_grad()
def covers(plan: Plan, searched: Searched | None, score: Tensor | None, rows: int, heads: int) -> Lists:
    """The cover of every block, by a learned policy or by scores (B or 1, H, N, C)."""
    device = (searched.ask if searched is not None else score).device  # type: ignore[union-attr]
    shape = (rows, heads, plan.blocks)
    fine, listed, count = (
        torch.empty(*shape, size, dtype=torch.int32, device=device) for size in (plan.most + 2, plan.room, 3)
    )
    lists = Lists(fine, listed, count)
    if searched is None:
        assert score is not None
        choose(plan, lists, score.expand(rows, -1, -1, -1).float().contiguous(), None, 0)
        return lists
    for begin, blocks in plan.segments(rows * heads):
        choose(plan, lists, *judged(plan, searched, heads, begin, blocks), begin)
    return lists


def attend(plan: Plan, q: Tensor, k: Tensor, v: Tensor, searched: Searched | None, lists: Lists) -> Tensor:
    """Attention (B, T, H*G, D) over covers, q (B, H*G, T, D), k and v (B, H, T, D); a learned policy gets the gradient
    that a bias on the logits of entries would have."""
    means, bias = summaries(plan, k.detach(), v.detach())
    more = (searched.ask, searched.find, searched.prior) if searched is not None else (None, None, None)
    return Reading.apply(plan, q, k, v, means, bias, lists, *more)


class Reading(torch.autograd.Function):
    """Reading of covers that were chosen; gradients of summaries go to what they are means of.

    Gradients are summed in float32 in whatever order programs end, so their last bits differ from call to call.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, means: Tensor, bias: Tensor, lists: Lists,
        *searched: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows, heads, tokens, dim = k.shape
        group = q.shape[1] // heads
        out = torch.empty(rows, tokens, heads * group, dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(rows, heads * group, tokens, dtype=torch.float32, device=q.device)
        read_kernel[(plan.blocks, rows * heads * group)](
            *_strided(q, k, v), means, bias, lists.fine, lists.list, lists.count, out, lse, heads, plan.blocks, tokens,
            lists.fine.shape[-1], lists.list.shape[-1], means.shape[3], rows * heads, plan.scale * LOG2E,
            G=group, D=dim, PRECISION=precision(q.dtype), **READ.options(), **plan.geometry,
        )  # fmt: skip
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, means, bias, out, lse, lists.fine, lists.list, lists.count, *searched)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, means, bias, out, lse, fine, listed, count, *parts = ctx.saved_tensors
        searched = None if parts[0] is None else Searched(*parts)
        plan: Plan = ctx.plan
        rows, heads, tokens, dim = k.shape
        group, pairs, lines = q.shape[1] // heads, rows * heads, means.shape[3]
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        sums = torch.zeros(2 * pairs * (tokens + lines) * dim, dtype=torch.float32, device=q.device)
        token_sums, mean_sums = sums.split((2 * pairs * tokens * dim, 2 * pairs * lines * dim))
        told = (rows, heads, plan.blocks, group)
        fine_grad = torch.empty(*told, fine.shape[-1], dtype=torch.float32, device=q.device)
        list_grad = torch.empty(*told, listed.shape[-1], dtype=torch.float32, device=q.device)
        dq = torch.empty_like(out)
        read_grad_kernel[(plan.blocks, pairs * group)](
            *_strided(q, k, v), means, bias, fine, listed, count, out, lse, grad, *grad.stride()[:3],
            dq, token_sums, mean_sums, fine_grad, list_grad, heads, plan.blocks, tokens, fine.shape[-1],
            listed.shape[-1], lines, pairs, plan.scale * LOG2E, plan.scale,
            G=group, D=dim, GATED=searched is not None, PRECISION=precision(q.dtype), **GRADIENT.options(),
            **plan.geometry,
        )  # fmt: skip
        dk, dv = (
            torch.empty(rows, tokens, heads, dim, dtype=part.dtype, device=q.device).transpose(1, 2) for part in (k, v)
        )
        block = 64
        spread_mean_kernel[(cdiv(tokens, block), pairs)](
            token_sums, mean_sums, dk, *dk.stride()[:3], dv, *dv.stride()[:3], heads, tokens, lines, pairs, plan.firsts,
            SIZES=plan.levels.sizes[1:], LEVELS=plan.top, D=dim, BLOCK=block, num_warps=4,
        )  # fmt: skip
        del sums, token_sums, mean_sums
        more: tuple[Tensor | None, ...] = (None, None, None)
        if searched is not None:
            more = _score_grads(plan, Lists(fine, listed, count), fine_grad, list_grad, searched)
        return None, dq.transpose(1, 2), dk, dv, None, None, None, *more


def _strided(*states: Tensor) -> list[Any]:
    """Each with its steps of rows, heads and tokens."""
    return [part for one in states for part in (one, *one.stride()[:3])]


def _score_grads(
    plan: Plan, lists: Lists, fine_grad: Tensor, list_grad: Tensor, searched: Searched
) -> tuple[Tensor, ...]:
    rows, heads, _, group, fines = fine_grad.shape
    ask, find, dims = searched.ask, searched.find, searched.find.shape[2] // heads
    parts = (ask, find, searched.prior)
    sizes = [part.numel() for part in parts]
    sums = torch.zeros(sum(sizes), dtype=torch.float32, device=ask.device)
    dask, dfind, dprior = sums.split(sizes)
    for begin, blocks in plan.segments(rows * heads):
        grad = torch.zeros(rows, heads, blocks, plan.chunks, dtype=torch.float32, device=ask.device)
        near = torch.empty(rows, heads, blocks, dtype=torch.float32, device=ask.device)
        gate_kernel[(blocks, rows * heads)](
            lists.fine, lists.list, lists.count, fine_grad, list_grad, grad, near, begin, blocks, plan.blocks,
            plan.chunks, fines, list_grad.shape[-1], plan.firsts,
            G=group, TOP=plan.top, SPANS=plan.spans, BF=power_of_2(fines), BM=64, num_warps=2,
        )  # fmt: skip
        score_grad_kernel[(cdiv(blocks, BN), cdiv(plan.chunks, BC), rows * heads)](
            ask, find, grad, near, dask, dfind, dprior, heads, begin, blocks, plan.chunks, ask.shape[1],
            dims**-0.5 * LOG2E, dims**-0.5,
            R=dims, PRECISION=precision(ask.dtype), num_warps=4, **plan.voters,
        )  # fmt: skip
    if ask.dtype == find.dtype:
        dask, dfind = sums[: sizes[0] + sizes[1]].to(ask.dtype).split(sizes[:2])
    return tuple(one.view(part.shape).to(part.dtype) for one, part in zip((dask, dfind, dprior), parts, strict=True))

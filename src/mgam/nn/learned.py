"""Multi-granular attention to be trained from scratch: a policy chooses among all levels, in either direction.

A straight-through gate teaches the policy: the score of what an entry stands for is added to its logit and taken away
again without gradient. Nothing changes, and the policy gets the gradient that a bias on these logits would have: what
would have lowered the loss with more weight is scored higher, at whichever level it was read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mgam.cover import indices
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.scores import LearnedScores, Part, at_random, scored, search_keys

# Shape letters: B rows, T tokens, H KV heads, G query heads per KV head, N blocks of b queries, C chunks, E entries, D.

Kind = Literal["learned", "scored", "fixed", "random"]
CLOSED = -1e9
"""Logit of an entry that is not there."""
SPARE = 8
"""Dimensions that keys have besides their own, the first of which holds a bias: kernels take multiples of eight."""
TOGETHER = {"cuda": 1 << 28, "cpu": 1 << 24}
"""Numbers of gathered keys at a time."""


@dataclass(frozen=True)
class Chosen:
    """What blocks read besides their windows.

    Shapes: opened (B, H, N, K), chunks read as tokens, -1 for none; read[l-1] (B, H, N, C_l), summaries that are read.
    """

    opened: Tensor
    read: tuple[Tensor, ...]


class LearnedGranularAttention(SelfAttention):
    """One softmax over a cover of the text: window, first chunk, what the policy opens, and summaries of the rest.

    Args:
        policy: `learned` has projections of its own and a gate that teaches them; `scored` uses the queries and keys
            of the reading; `fixed` opens what is nearest; `random` ignores the text.
        levels: tokens of a chunk at each level.
        search: tokens of a search key.
        window: tokens beside a block of queries that are always read; half on either side if it is not causal.
        budget: tokens that are opened at most, besides window and first chunk.
        middle: regions of each coarser level that are read one level finer, though nothing in them is opened.
        block: queries that share a cover; a causal one is decided by queries up to its first.
        every: one of so many queries votes.
        dims: search dimensions of the learned policy.
        share: of all attention, as the learned policy predicts, that is to be read as tokens: blocks open as few chunks
            as hold it. None: every block spends its budget.
        rest: what becomes of chunks that are not opened.
        mass: how far a summary counts for its tokens, from 0 (once) to 1 (once per token).
        recompute: gathers again in the backward pass, so that nothing gathered is kept.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        policy: Kind = "learned",
        levels: tuple[int, ...] = (1, 32, 256),
        search: int = 8,
        window: int = 256,
        budget: int = 256,
        middle: int = 2,
        block: int = 64,
        every: int = 8,
        dims: int = 16,
        share: float | None = 0.95,
        rest: Literal["summaries", "drop"] = "summaries",
        mass: float = 1.0,
        seed: int = 0,
        recompute: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        if policy not in ("learned", "scored", "fixed", "random"):
            raise SettingError(f"policy={policy!r} is unknown; choose learned, scored, fixed or random")
        if rest not in ("summaries", "drop"):
            raise SettingError(f"rest={rest!r} is unknown; choose summaries or drop")
        self.levels, self.policy, self.rest = Levels(levels, search), policy, rest
        self.side = window if self.causal else window // 2
        for name, value in (("block", block), ("window on a side", self.side)):
            if value < 1 or value % self.levels.chunk:
                raise SettingError(f"{name}={value} must be a multiple of the chunk size {self.levels.chunk}")
        above("budget", budget, self.levels.chunk)
        above("middle", middle, 0)
        above("every", every, 1)
        above("dims", dims, 1)
        if not 0 <= mass <= 1 or (share is not None and not 0 < share <= 1):
            raise SettingError(f"mass={mass} lies between 0 and 1, share={share} above 0 and up to 1, or is None")
        self.budget, self.middle, self.block, self.every = budget, middle, block, every
        self.share, self.mass, self.seed, self.recompute = share, mass, seed, recompute
        self.scores = LearnedScores(width, self.kv_heads, dims) if policy == "learned" else None
        self.seen_covers: list[tuple[Part, Chosen]] | None = None
        """Give it a list, and covers are put there: for counts and pictures."""

    def extra(self, states: Tensor, q: Tensor, first: int) -> dict[str, Tensor]:
        """What the policy searches with."""
        if self.scores is not None:
            return self.scores.project(states)
        return {"ask": q.detach()} if self.policy == "scored" else {}

    def attend(self, seen: Seen) -> Tensor:
        """Blocks of the new queries over their covers."""
        tokens, length, block = seen.k.shape[2], seen.q.shape[2], self.block
        low, stop = seen.first // block, -(-tokens // block)
        pyramid = self.pyramid(seen)
        q = F.pad(F.pad(seen.q, (0, 1), value=1.0), (0, SPARE - 1, seen.first - low * block, stop * block - tokens))
        q = q.unflatten(2, (-1, block)).unflatten(1, (self.kv_heads, -1)).transpose(2, 3)  # (B, H, N, G, b, D)
        per_block = len(q) * self.kv_heads * 2 * self.dim * self.at_most(tokens)
        step = max(1, TOGETHER.get(q.device.type, 1 << 24) // per_block)
        outs = []
        for begin in range(low, stop, step):
            there = q[:, :, begin - low : begin - low + step]
            if self.recompute and torch.is_grad_enabled():
                out = checkpoint(
                    self._read, there, begin, tokens, seen, *pyramid, use_reentrant=False, preserve_rng_state=False
                )
            else:
                out = self._read(there, begin, tokens, seen, *pyramid)
            outs.append(out)
        out = torch.cat(outs, 2).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return out[:, :, seen.first - low * block :][:, :, :length]

    def pyramid(self, seen: Seen) -> list[Tensor]:
        """Keys and values in chunks (B, H, C, n, D), search keys, then keys and values of each level (B, H, C_l, D).

        Keys have SPARE dimensions more.
        """
        chunk, tokens = self.levels.chunk, seen.k.shape[2]
        chunks = -(-tokens // self.block) * self.block // chunk
        after = chunks * chunk - tokens
        keys = F.pad(seen.k, (0, SPARE, 0, after)).unflatten(2, (chunks, chunk))
        values = F.pad(seen.v, (0, 0, 0, after)).unflatten(2, (chunks, chunk))
        found = {"learned": seen.more.get("find"), "scored": seen.k.detach()}.get(self.policy)
        search = keys[..., :0, :] if found is None else search_keys(found, chunks, chunk, self.levels.search)
        made = [keys, values, search]
        upper = [keys.mean(3), values.mean(3)]
        for level in range(1, self.levels.top + 1):
            if level > 1:
                ratio = self.levels.ratio(level)
                upper = [
                    F.pad(part, (0, 0, 0, -part.shape[2] % ratio)).unflatten(2, (-1, ratio)).mean(3) for part in upper
                ]
            made += upper
        return made

    def part(self, begin: int, count: int, tokens: int, device: torch.device) -> Part:
        """The blocks from number `begin` on."""
        start = (begin + torch.arange(count, device=device)) * self.block
        right = start + self.block + (0 if self.causal else self.side)
        return Part(start, (start - self.side).clamp_min(0), right, self.block, self.levels.chunk, tokens, self.causal)

    def judge(self, part: Part, search: Tensor, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Scores (B, H, N, C) of chunks, and of what is near where the policy learns."""
        rows, chunks = len(seen.k), search.shape[2]
        if self.scores is not None:
            return self.scores(seen.more["ask"], search, part, self.every)
        if self.policy == "scored":
            return self.scale * scored(seen.more["ask"], search, part, self.every), None
        if self.policy == "random":
            return at_random(part, self.kv_heads, chunks, self.seed).expand(rows, -1, -1, -1), None
        return -part.distance(chunks).abs().float().expand(rows, self.kv_heads, -1, -1), None

    @torch.no_grad()
    def choose(self, part: Part, score: Tensor, near: Tensor | None) -> Chosen:
        """The cover of each block."""
        chunks, levels = score.shape[-1], self.levels
        end = (torch.arange(chunks, device=score.device) + 1) * levels.chunk
        visible = end <= part.left[:, None]
        if not self.causal:
            visible = visible | ((end - levels.chunk >= part.right[:, None]) & (end <= part.tokens))
        free = visible.clone()
        free[:, 0] = False
        most = min(self.budget // levels.chunk, chunks)
        ranked = score.masked_fill(~free, -torch.inf).sort(dim=-1, descending=True, stable=True)
        value, opened = ranked.values[..., :most], ranked.indices[..., :most]
        wanted = value > -torch.inf
        if near is not None and self.share is not None:
            total = torch.logaddexp(near, ranked.values.logsumexp(-1))[..., None]
            gain = (value - total).exp()
            wanted &= (near[..., None] - total).exp() + gain.cumsum(-1) - gain < self.share
        fine = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, opened, wanted)
        fine[..., 0] = visible[:, 0]
        opened = opened.masked_fill(~wanted, -1)
        if self.rest == "drop":
            return Chosen(opened, ())
        return Chosen(opened, self._rest(score, fine, visible.expand_as(fine)))

    def _rest(self, score: Tensor, fine: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        """Summaries that complete the partition, as coarse as they can be, but for the best `middle` regions."""
        whole, split, scores = [visible], [fine], score.masked_fill(fine | ~visible, -torch.inf)
        for level in range(2, self.levels.top + 1):
            ratio = self.levels.ratio(level)
            wide = (0, -whole[-1].shape[-1] % ratio)
            here = F.pad(whole[-1], wide).unflatten(-1, (-1, ratio)).all(-1)
            apart = F.pad(split[-1], wide).unflatten(-1, (-1, ratio)).any(-1) | ~here
            scores = F.pad(scores, wide, value=-torch.inf).unflatten(-1, (-1, ratio)).logsumexp(-1)
            scores = scores.masked_fill(apart, -torch.inf)
            best = scores.sort(dim=-1, descending=True, stable=True)
            few = min(self.middle, scores.shape[-1])
            keep = torch.zeros_like(apart).scatter_(-1, best.indices[..., :few], best.values[..., :few] > -torch.inf)
            scores = scores.masked_fill(keep, -torch.inf)
            whole.append(here)
            split.append(apart | keep)
        read = []
        for level, (there, apart) in enumerate(zip(whole, split, strict=True), start=1):
            one = there & ~apart
            if level < self.levels.top:
                one = one & split[level].repeat_interleave(self.levels.ratio(level + 1), -1)[..., : one.shape[-1]]
            read.append(one)
        return tuple(read)

    def _limits(self, tokens: int) -> list[int]:
        """Most summaries of each level but the coarsest that one block reads."""
        most = self.budget // self.levels.chunk + self.middle + 4  # first region, borders of window and text
        found = []
        for level in range(1, self.levels.top):
            count = -(-tokens // self.block) * self.block // self.levels.sizes[level]
            found.append(min(count, most * self.levels.ratio(level + 1)))
        return found

    def at_most(self, tokens: int) -> int:
        """Entries that are gathered for one block."""
        near = self.block + self.side * (1 if self.causal else 2)
        fine = 2 * self.levels.chunk + min(self.budget, tokens)
        rest = 0 if self.rest == "drop" else sum(self._limits(tokens)) + tokens // self.levels.sizes[-1] + 1
        return near + fine + rest

    def _read(self, q: Tensor, begin: int, tokens: int, seen: Seen, *pyramid: Tensor) -> Tensor:
        """Queries (B, H, N, G, b, D+) of blocks from `begin` on: their outputs (B, H, N, G, b, D)."""
        keys, values, search, *upper = pyramid
        part = self.part(begin, q.shape[2], tokens, q.device)
        score, near = self.judge(part, search, seen)
        chosen = self.choose(part, score, near)
        if self.seen_covers is not None:
            self.seen_covers.append((part, chosen))
        gate = None if near is None else _gate(score)
        near = None if near is None else _gate(near)
        k, v, bias = self._gather(part, begin, chosen, keys, values, upper, gate, near)
        rows, heads, blocks, group, block, _ = q.shape
        q = q.flatten(0, 2)
        k[..., self.dim] = (bias / self.scale).to(k.dtype)  # met by a 1 in every query
        shape = (len(q), group, k.shape[3], -1)
        k, v = (one.flatten(0, 2)[:, None].expand(shape) for one in (k, v))
        mask = self._causality(k.shape[2], q) if self.causal else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out.view(rows, heads, blocks, group, block, -1)

    def _causality(self, entries: int, q: Tensor) -> Tensor:
        """(1, 1, b, E), 0 and -inf: the window comes first, the block last in it."""
        key = torch.arange(entries, device=q.device)
        later = (key > self.side + torch.arange(self.block, device=q.device)[:, None]) & (key < self.side + self.block)
        return torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(later, -torch.inf)[None, None]

    def _gather(
        self,
        part: Part,
        begin: int,
        chosen: Chosen,
        keys: Tensor,
        values: Tensor,
        upper: list[Tensor],
        gate: Tensor | None,
        near: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (B, H, N, E, D+SPARE), values (B, H, N, E, D) and what is added to logits (B, H, N, E).

        Entries come as window, ends of the text, opened chunks, summaries level by level.
        """
        rows, heads, _, chunk, _ = keys.shape
        blocks, device = len(part.start), keys.device
        shape = (rows, heads, blocks)
        wide = torch.promote_types(keys.dtype, torch.float32)
        near = keys.new_zeros((), dtype=wide) if near is None else near[..., None]
        taken: list[list[Tensor]] = []
        biases: list[Tensor] = []

        def add(live: Tensor, bias: Tensor, *states: Tensor) -> None:
            taken.append(list(states))
            shut = torch.where(live, bias, CLOSED)
            biases.append(shut.expand(*shape, shut.shape[-1]))

        reach = self.block + self.side * (1 if self.causal else 2)
        place = part.start[:, None] - self.side + torch.arange(reach, device=device)
        windows = [self._windows(one, begin, blocks) for one in (keys, values)]
        add((place >= 0) & (place < part.tokens), near, *windows)
        inside = torch.arange(chunk, device=device)
        ends = [(0, part.left >= chunk)]
        if not self.causal and part.tokens % chunk:
            ends.append((part.tokens // chunk, part.right <= part.tokens // chunk * chunk))
        for number, there in ends:
            live = there[:, None] & (number * chunk + inside < part.tokens)
            add(live, near, *(one[:, :, None, number].expand(*shape, -1, -1) for one in (keys, values)))
        index = chosen.opened
        if index.shape[-1]:
            live, safe = (index >= 0).repeat_interleave(chunk, -1), index.clamp_min(0)
            bias = near.new_zeros(()) if gate is None else gate.gather(-1, safe).repeat_interleave(chunk, -1)
            add(live, bias, *(_rows(one, safe).flatten(3, 4) for one in (keys, values)))
        for level, read in enumerate(chosen.read, start=1):
            states, weight = upper[2 * level - 2 : 2 * level], self.mass * math.log(self.levels.sizes[level])
            if gate is not None and level > 1:
                ratio = self.levels.ratio(level)
                gate = F.pad(gate, (0, -gate.shape[-1] % ratio)).unflatten(-1, (-1, ratio)).mean(-1)
            if level == self.levels.top:
                bias = near.new_tensor(weight) if gate is None else gate + weight
                add(read, bias, *(one[:, :, None].expand(*shape, -1, -1) for one in states))
                break
            index = indices(read, self._limits(part.tokens)[level - 1])
            safe = index.clamp_min(0)
            bias = near.new_tensor(weight) if gate is None else gate.gather(-1, safe) + weight
            add(index >= 0, bias, *(_rows(one, safe) for one in states))
        spare = -sum(one.shape[-1] for one in biases) % 16  # kernels take multiples of 16
        nothing = [one.new_zeros(()).expand(*shape, spare, one.shape[-1]) for one in (keys, values)]
        add(torch.zeros(spare, dtype=torch.bool, device=device), near.new_zeros(()), *nothing)
        k, v = (torch.cat(kind, 3) for kind in zip(*taken, strict=True))
        return k, v, torch.cat(biases, -1)

    def _windows(self, chunks: Tensor, begin: int, blocks: int) -> Tensor:
        """States (B, H, N, W, D) in the windows of blocks, a view of those in chunks (B, H, C, n, D)."""
        after = 0 if self.causal else self.side
        flat = F.pad(chunks.flatten(2, 3), (0, 0, self.side, after))[:, :, begin * self.block :]
        return flat.unfold(2, self.side + self.block + after, self.block)[:, :, :blocks].transpose(-1, -2)


def _gate(score: Tensor) -> Tensor:
    """Zero, with the gradient of the score."""
    return torch.where(score.isfinite(), score - score.detach(), 0.0)


def _rows(states: Tensor, index: Tensor) -> Tensor:
    """Entries (B, H, N, M, ...) of states (B, H, C, ...) at index (B, H, N, M)."""
    rows, heads, count = states.shape[:3]
    base = torch.arange(rows * heads, device=index.device).view(rows, heads, 1, 1) * count
    return states.flatten(0, 2).index_select(0, (index + base).flatten()).unflatten(0, index.shape)

"""Multi-granular attention to be trained from scratch: a policy chooses among all levels, in either direction.

A straight-through gate teaches the policy: the score of what an entry stands for is added to its logit and taken away
again without gradient. Nothing changes, and the policy gets the gradient that a bias on these logits would have: what
would have lowered the loss with more weight is scored higher, at whichever level it was read.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mgam.errors import SettingError
from mgam.kernels import installed
from mgam.levels import Levels
from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.chosen import Chooser, Chosen, Rest
from mgam.nn.gathered import Voice, gather
from mgam.nn.scores import LearnedScores, Part, at_random, scored, search_keys

if TYPE_CHECKING:
    from mgam.nn.fused.attend import Plan

# Shape letters: B rows, T tokens, H KV heads, G query heads per KV head, N blocks of b queries, C chunks, E entries, D.

Kind = Literal["learned", "scored", "fixed", "random"]
SPARE = 8
"""Dimensions that keys have besides their own, the first of which holds a bias: kernels take multiples of eight."""
TOGETHER = {"cuda": 1 << 29, "cpu": 1 << 24}
"""Numbers of gathered keys at a time."""
MOST_CHUNKS, MOST_OPENED = 8192, 64
"""Of a text and of a block, for kernels: one program chooses a block's cover."""
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run in Triton's interpreter, for tests."""


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
        kernels: whether whole texts are read by fused kernels, which gather nothing, where these serve: half precision
            on a CUDA device, block, chunk, heads and dims of powers of two from 16 on.
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
        rest: Rest = "summaries",
        mass: float = 1.0,
        seed: int = 0,
        recompute: bool = False,
        kernels: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        if policy not in ("learned", "scored", "fixed", "random"):
            raise SettingError(f"policy={policy!r} is unknown; choose learned, scored, fixed or random")
        if rest not in ("summaries", "drop"):
            raise SettingError(f"rest={rest!r} is unknown; choose summaries or drop")
        self.levels, self.policy = Levels(levels, search), policy
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
        self.block, self.every = block, every
        self.chooser = Chooser(self.levels, budget, middle, share, rest)
        self.mass, self.seed, self.recompute, self.kernels = mass, seed, recompute, kernels
        self.scores = LearnedScores(width, self.kv_heads, dims) if policy == "learned" else None
        self.seen_covers: list[tuple[Part, Chosen]] | None = None
        """Give it a list, and covers are put there: for counts and pictures."""
        self.lessons: list[Tensor] | None = None
        """Give it a list, and how far a learned policy was from the attention that regions were given is put there, as
        cross entropies (B, H, N): a loss that teaches the policy besides, and nothing else."""

    def extra(self, states: Tensor, q: Tensor, first: int) -> dict[str, Tensor]:
        """What the policy searches with."""
        if self.scores is not None:
            return self.scores.project(states)
        return {"ask": q.detach()} if self.policy == "scored" else {}

    def _whole(self, states: Tensor) -> Tensor:
        if states.shape[1] and self.kernels and self.served(states):
            with torch.cuda.device_of(states):  # kernels are launched on the current device, and this may be another
                return self.out(self.fused(states).flatten(2))
        return super()._whole(states)

    def served(self, states: Tensor) -> bool:
        """Whether fused kernels can read a text (B, T, width)."""
        device = states.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        if not installed() or self.lessons is not None:
            return False
        able = device == "cuda" and half in (torch.float16, torch.bfloat16)
        if not able and not (INTERPRETED and half == torch.float32):
            return False
        chunks = -(-states.shape[1] // self.block) * self.block // self.levels.chunk
        ratios = [self.levels.ratio(level) for level in range(2, self.levels.top + 1)]
        powers = [self.block, self.levels.chunk, self.dim, self.levels.search_per_chunk, *ratios]
        if self.scores is not None:
            powers += [self.scores.dims]
        return (
            all(size & (size - 1) == 0 for size in powers)
            and min(self.block, self.levels.chunk, self.dim, self.scores.dims if self.scores is not None else 16) >= 16
            and max(self.block, self.dim) <= 128
            and self.block % self.every == 0
            and chunks <= MOST_CHUNKS
            and self.chooser.budget // self.levels.chunk <= MOST_OPENED
        )

    def plan(self, tokens: int) -> Plan:
        """What kernels know of a text of so many tokens."""
        from mgam.nn.fused.attend import plan_of

        return plan_of(tokens, self.block, self.side, self.causal, self.every, self.chooser, self.mass, self.scale)

    def fused(self, states: Tensor) -> Tensor:
        """What `attend` gives for a whole text (B, T, width), as (B, T, heads, D), by kernels."""
        from mgam.nn.fused.attend import Searched, attend, covers

        rows, tokens, _ = states.shape
        plan = self.plan(tokens)
        q = self.turned(self.split(self.query(states)), 0)
        k = self.turned(self.split(self.key(states)), 0)
        v = self.split(self.value(states))
        searched, score = None, None
        if self.scores is not None:
            searched = Searched(*self.scores.searched(states, plan.chunks, self.levels, self.every))
        else:
            score = self._plain_scores(plan, Seen(states, q, k, v, {"ask": q.detach()}))
        lists = covers(plan, searched, score, rows, self.kv_heads)
        if self.seen_covers is not None:
            self.seen_covers.append((self.part(0, plan.blocks, tokens, states.device), lists.chosen(plan)))
        return attend(plan, q, k, v, searched, lists)

    def _plain_scores(self, plan: Plan, seen: Seen) -> Tensor:
        """Scores (B or 1, H, N, C) of a policy that has nothing to learn."""
        part = self.part(0, plan.blocks, plan.tokens, seen.k.device)
        search = seen.k.new_empty(len(seen.k), self.kv_heads, plan.chunks, 0)
        if self.policy == "scored":
            search = search_keys(seen.k.detach(), plan.chunks, self.levels.chunk, self.levels.search)
        return self.judge(part, search, seen)[0]

    def attend(self, seen: Seen) -> Tensor:
        """Blocks of the new queries over their covers."""
        tokens, length, block = seen.k.shape[2], seen.q.shape[2], self.block
        low, stop = seen.first // block, -(-tokens // block)
        pyramid = self.pyramid(seen)
        q = F.pad(F.pad(seen.q, (0, 1), value=1.0), (0, SPARE - 1, seen.first - low * block, stop * block - tokens))
        q = q.unflatten(2, (-1, block)).unflatten(1, (self.kv_heads, -1)).transpose(2, 3)  # (B, H, N, G, b, D)
        per_block = len(q) * self.kv_heads * 2 * self.dim * self.at_most(tokens)
        step = max(1, TOGETHER.get(q.device.type, 1 << 24) // per_block)
        outs, teach = [], self.lessons is not None
        for begin in range(low, stop, step):
            given = (q[:, :, begin - low : begin - low + step], begin, teach, tokens, seen, *pyramid)
            if self.recompute and torch.is_grad_enabled():
                out, lesson = checkpoint(self._read, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                out, lesson = self._read(*given)
            outs.append(out)
            if self.lessons is not None and lesson is not None:
                self.lessons.append(lesson)
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

    def choose(self, part: Part, score: Tensor, near: Tensor | None) -> Chosen:
        """The cover of each block."""
        return self.chooser(part, score, near)

    def at_most(self, tokens: int) -> int:
        """Entries that are gathered for one block."""
        near = self.block + self.side * (1 if self.causal else 2)
        return near + self.chooser.at_most(tokens, -(-tokens // self.block) * self.block // self.levels.chunk)

    def _read(
        self, q: Tensor, begin: int, teach: bool, tokens: int, seen: Seen, *pyramid: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Queries (B, H, N, G, b, D+) of blocks from `begin` on: their outputs (B, H, N, G, b, D), and the lesson."""
        keys, values, search, *upper = pyramid
        part = self.part(begin, q.shape[2], tokens, q.device)
        score, near = self.judge(part, search, seen)
        chosen = self.choose(part, score, near)
        if self.seen_covers is not None:
            self.seen_covers.append((part, chosen))
        gate = None if near is None else Voice(_gate(score), _gate(near))
        told = Voice(score, near, sums=True) if teach and near is not None else None
        most = self.chooser.limits(search.shape[2])
        k, v, bias, said = gather(
            part, begin, self.side, chosen, self.levels, self.mass, most, [keys, values, *upper], gate, told
        )
        k[..., self.dim] = (bias / self.scale).to(k.dtype)  # met by a 1 in every query
        mask = self._causality(k.shape[3], q) if self.causal else None
        lesson = None
        if said is not None and told is not None:
            _, free = self.chooser.free(part, score.shape[-1])
            total = torch.logaddexp(told.near, score.masked_fill(~free, -torch.inf).logsumexp(-1))
            lesson = (self._given(part, q, k, mask).to(said.dtype) * (total[..., None] - said)).sum(-1)
        rows, heads, blocks, group, block, _ = q.shape
        q = q.flatten(0, 2)
        shape = (len(q), group, k.shape[3], -1)
        k, v = (one.flatten(0, 2)[:, None].expand(shape) for one in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out.view(rows, heads, blocks, group, block, -1), lesson

    @torch.no_grad()
    def _given(self, part: Part, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Attention (B, H, N, E) that entries are given: the mean over one of `every` queries of a block."""
        logits = self.scale * q[..., :: self.every, :] @ k[:, :, :, None].transpose(-1, -2)
        if mask is not None:
            logits = logits + mask[0, 0, :: self.every]
        there = part.start[:, None] + torch.arange(0, self.block, self.every, device=q.device) < part.tokens
        weight = there / there.sum(-1, keepdim=True)
        return (logits.float().softmax(-1).mean(3) * weight[..., None]).sum(3)

    def _causality(self, entries: int, q: Tensor) -> Tensor:
        """(1, 1, b, E), 0 and -inf: the window comes first, the block last in it."""
        key = torch.arange(entries, device=q.device)
        later = (key > self.side + torch.arange(self.block, device=q.device)[:, None]) & (key < self.side + self.block)
        return torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(later, -torch.inf)[None, None]


def _gate(score: Tensor) -> Tensor:
    """Zero, with the gradient of the score."""
    return torch.where(score.isfinite(), score - score.detach(), 0.0)

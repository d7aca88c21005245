"""Cross attention: queries of one text over the tokens of another, its source."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgam.errors import SettingError
from mgam.merge import merge
from mgam.nn.base import above, check_states, live_places
from mgam.nn.performer import attend, orthogonal
from mgam.nn.sparse import by_lists, softmax

# Shape letters: B rows, L target tokens, S source tokens, H query heads, K KV heads, G = H/K, D head dim.


class CrossAttention(nn.Module, ABC):
    """Attention of target states (B, L, width) over source states (B, S, width).

    Every query reads the source for itself, so that it serves causal and noncausal targets alike. There are no
    positions: what places mean must be in the states.

    Args:
        width: size of hidden states.
        heads: query heads.
        kv_heads: KV heads, a divisor of `heads`; None for as many.

    Raises:
        SettingError: for sizes that do not divide.
    """

    def __init__(self, width: int, heads: int, kv_heads: int | None = None) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or width % heads:
            raise SettingError(f"width={width} must be a multiple of heads={heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise SettingError(f"kv_heads={kv_heads} must divide heads={heads}")
        self.width, self.heads, self.kv_heads, self.dim = width, heads, kv_heads, width // heads
        self.scale = self.dim**-0.5
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, states: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the target reads from the source.

        Shapes: states (B, L, width), source (B, S, width), mask (B, S), True for source tokens. Returns (B, L, width);
        zeros where a row has no source.

        Raises:
            SettingError: for states, rows or a mask that do not fit, and when a row's source tokens do not stand
                together.
        """
        check_states(states, self.width)
        check_states(source, self.width)
        if len(source) != len(states):
            raise SettingError(f"{len(source)} rows of source were given for {len(states)} rows of target")
        places = live_places(mask, source)
        if places is None:
            return self._whole(states, source)
        out = torch.zeros_like(states)
        for row, place in places:
            out[row] = self._whole(states[row : row + 1], source[row : row + 1, place])[0]
        return out

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, L, D) over k, v (B, K, S, D): (B, H, L, D)."""

    def _whole(self, states: Tensor, source: Tensor) -> Tensor:
        if not states.shape[1] or not source.shape[1]:
            return torch.zeros_like(states)
        q, k, v = self._split(self.query(states)), self._split(self.key(source)), self._split(self.value(source))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(2, (-1, self.dim)).transpose(1, 2)


class FullCrossAttention(CrossAttention):
    """Every target token reads every source token."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over all keys."""
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class PerformerCrossAttention(CrossAttention):
    """FAVOR+ over the source (Choromanski et al. 2021, arXiv 2009.14794): linear in target and source."""

    features: Tensor

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, *, rank: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(width, heads, kv_heads)
        rank = math.ceil(self.dim * math.log(max(self.dim, 3))) if rank is None else rank
        above("rank", rank, 1)
        self.register_buffer("features", orthogonal(rank, self.dim, seed))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sums over the whole source."""
        return attend(q, k, v, self.features, self.scale)


class MultiGranularCrossAttention(CrossAttention):
    """One softmax over a partition of the source: the chunks that a query searches for as tokens, the rest as means.

    The query heads of a group choose together: a chunk is as good as its best search key, a mean of `search` tokens,
    for any of them. The source's last, incomplete chunk is read as tokens.

    Args:
        chunk: tokens of a chunk; a multiple of `search`.
        budget: source tokens that a query reads as tokens, in whole chunks.
        search: tokens of a search key.
        mass: how far a chunk's mean counts for its tokens, from 0 (once) to 1 (once per token).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        chunk: int = 16,
        budget: int = 32,
        search: int = 2,
        mass: float = 1.0,
    ) -> None:
        super().__init__(width, heads, kv_heads)
        above("search", search, 1)
        above("chunk", chunk, 1)
        if chunk % search:
            raise SettingError(f"search={search} must divide chunk={chunk}")
        if budget < chunk:
            raise SettingError(f"budget={budget} must be one chunk ({chunk}) or more")
        if not 0 <= mass <= 1:
            raise SettingError(f"mass={mass} must lie between 0 (a mean counts once) and 1 (once per token)")
        self.chunk, self.budget, self.search, self.mass = chunk, budget, search, mass

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Opened chunks, the tail, and the means of the others, joined as one softmax."""
        count, length, device = k.shape[2] // self.chunk, q.shape[2], q.device
        grouped = q.unflatten(1, (self.kv_heads, -1))
        tail = torch.arange(count * self.chunk, k.shape[2], device=device).expand(q.shape[0], self.kv_heads, length, -1)
        if not count:
            return by_lists(q, k, v, k.shape[2], tail, self.scale).out
        whole = count * self.chunk
        with torch.no_grad():
            keys = k[:, :, :whole].unflatten(2, (-1, self.search)).mean(3)
            found = (grouped @ keys[:, :, None].transpose(-1, -2)).amax(2)
            best = found.unflatten(-1, (count, -1)).amax(-1)
            chosen = best.sort(dim=-1, descending=True, stable=True).indices[..., : self.budget // self.chunk]
        opened = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True)
        index = (chosen[..., None] * self.chunk + torch.arange(self.chunk, device=device)).flatten(3)
        near = by_lists(q, k, v, k.shape[2], torch.cat((index, tail), -1), self.scale)
        means = [part[:, :, :whole].unflatten(2, (count, self.chunk)).mean(3)[:, :, None] for part in (k, v)]
        logits = self.scale * grouped @ means[0].transpose(-1, -2) + self.mass * math.log(self.chunk)
        far = softmax(logits, ~opened[:, :, None], means[1])
        return merge([type(far)(far.out.flatten(1, 2), far.lse.flatten(1, 2)), near]).out

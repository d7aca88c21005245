"""Dynamic group attention: focal tokens as they are, the others pooled in groups (arXiv 2505.22107)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.merge import Part, merge
from mgam.nn.base import Seen, SelfAttention, State, above, last
from mgam.nn.sparse import by_blocks, softmax, spans


class DynamicGroupAttention(SelfAttention):
    """An exact partition of the past for each block of queries.

    Of the tokens before the block, the share `focal` that matters most is read token by token; the others keep their
    order and are pooled in groups of `group`, weighted by a softmax of their importances; those of the last, incomplete
    group and the block's own tokens are complementary: read token by token. One softmax runs over all.

    Importance is causal here: the attention that a token got from the last `look` queries before the block, summed over
    the heads of a KV head. The paper takes it from the whole text while training, which lets later tokens choose.

    Args:
        mass: whether a group counts as often as it has tokens (the paper: once).
    """

    BIDIRECTIONAL = False

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        focal: float = 0.1,
        group: int = 16,
        block: int = 64,
        look: int = 16,
        mass: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        if not 0 <= focal <= 1:
            raise SettingError(f"focal={focal} must be a share between 0 and 1")
        for name, value in (("group", group), ("block", block), ("look", look)):
            above(name, value, 1)
        self.focal, self.group, self.block, self.look, self.mass = focal, group, block, look, mass

    def extra(self, states: Tensor, q: Tensor, first: int) -> dict[str, Tensor]:
        """Queries before a block judge its past."""
        return {"q": q}

    def known(self, q: Tensor, new: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        """Keys, values and queries, and the past as it is arranged for the newest block: once per block."""
        known, tokens = super().known(q, new, state), state.tokens + q.shape[2]
        start = self.begin(tokens - 1)
        if not state.tokens or start > self.begin(state.tokens - 1):
            known["past_k"], known["past_v"] = self.arranged(known, tokens, start)
        return known

    def keep(self, known: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """All but the queries that judge no past any more: neither that of the newest block nor a later one."""
        return known | {"q": last(known["q"], tokens - self.begin(tokens - 1) + self.look)}

    def begin(self, query: int) -> int:
        """Where the block of a query begins."""
        return query // self.block * self.block

    def attend(self, seen: Seen) -> Tensor:
        """Block by block of queries: the past of each is arranged anew."""
        length, tokens = seen.q.shape[2], seen.k.shape[2]
        together = min(self.block, length)
        index = spans(seen.first, length, together, min(self.block, tokens), 0, seen.q.device)

        def see(query: Tensor, key: Tensor) -> Tensor:
            return (key >= query // self.block * self.block) & (key <= query)

        near = by_blocks(seen.q, seen.k, seen.v, seen.first, together, index, see, self.scale)
        parts = []
        for start in range(self.begin(seen.first), tokens, self.block):
            q = seen.q[:, :, max(0, start - seen.first) : start + self.block - seen.first]
            newest = start + self.block >= tokens
            past = (seen.more["past_k"], seen.more["past_v"]) if newest else self.arranged(seen.more, tokens, start)
            parts.append(self._past(q, *past, start))
        far = Part(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))
        return merge([far, near]).out

    def importance(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention (B, K, T) to tokens of keys k (B, K, T, D) from the last of them, of queries q (B, H, L, D)."""
        logits = self.scale * q.unflatten(1, (self.kv_heads, -1)) @ k[:, :, None].transpose(-1, -2)
        own = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=k.device)
        future = torch.arange(k.shape[2], device=k.device) > own[:, None]
        return torch.softmax(logits.masked_fill(future, -torch.inf), -1).sum((2, 3))

    def split_of(self, start: int) -> tuple[int, int]:
        """Of so many tokens before a block: how many are focal, and how many whole groups the others make."""
        focal = math.floor(self.focal * start)
        return focal, (start - focal) // self.group

    def arranged(self, known: dict[str, Tensor], tokens: int, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, N, D) of the past of the block at `start`: single tokens in order, then groups."""
        k, v, asking = known["k"][:, :, :start], known["v"][:, :, :start], known["q"]
        gone = tokens - asking.shape[2]
        matter = self.importance(asking[:, :, max(0, start - self.look) - gone : start - gone], k)
        focal, groups = self.split_of(start)
        order = torch.argsort(matter.detach(), dim=-1, descending=True, stable=True)
        chosen, rest = order[..., :focal].sort(-1).values, order[..., focal:].sort(-1).values
        whole, apart = rest[..., : groups * self.group], (groups, self.group)
        single = torch.cat((chosen, rest[..., groups * self.group :]), -1)
        share = torch.softmax(matter.gather(2, whole).unflatten(2, apart), -1)[..., None].to(k.dtype)
        k, v = (
            torch.cat((_at(part, single), (share * _at(part, whole).unflatten(2, apart)).sum(3)), 2) for part in (k, v)
        )
        return k, v

    def _past(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Part:
        if not start:
            return Part(torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf))
        logits = self.scale * q.unflatten(1, (self.kv_heads, -1)) @ k[:, :, None].transpose(-1, -2)
        if self.mass:
            pooled = torch.arange(k.shape[2], device=q.device) >= k.shape[2] - self.split_of(start)[1]
            logits = logits + math.log(self.group) * pooled.to(logits.dtype)
        every = torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device)
        part = softmax(logits, every, v[:, :, None])
        return Part(part.out.flatten(1, 2), part.lse.flatten(1, 2))


def _at(states: Tensor, index: Tensor) -> Tensor:
    return states.gather(2, index[..., None].expand(-1, -1, -1, states.shape[3]))

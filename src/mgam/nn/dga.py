"""Dynamic group attention: focal tokens as they are, the others pooled in groups (arXiv 2505.22107)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.merge import Part, merge
from mgam.nn.base import Seen, SelfAttention, above
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

    def attend(self, seen: Seen) -> Tensor:
        """Block by block of queries: the past of each is arranged anew."""
        index = spans(seen.first, seen.q.shape[2], self.block, self.block, 0, seen.q.device)

        def see(query: Tensor, key: Tensor) -> Tensor:
            return (key >= query // self.block * self.block) & (key <= query)

        near = by_blocks(seen.q, seen.k, seen.v, seen.first, self.block, index, see, self.scale)
        parts, last = [], seen.k.shape[2]
        for start in range(seen.first // self.block * self.block, last, self.block):
            span = slice(max(start, seen.first) - seen.first, min(start + self.block, last) - seen.first)
            parts.append(self._past(seen, seen.q[:, :, span], start))
        far = Part(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))
        return merge([far, near]).out

    def importance(self, seen: Seen, start: int) -> Tensor:
        """Attention (B, K, start) that the tokens before a block got from the last queries before it."""
        asking = seen.more["q"][:, :, max(0, start - self.look) : start].unflatten(1, (self.kv_heads, -1))
        logits = self.scale * asking @ seen.k[:, :, None, :start].transpose(-1, -2)
        own = torch.arange(max(0, start - self.look), start, device=logits.device)
        future = torch.arange(start, device=logits.device) > own[:, None]
        return torch.softmax(logits.masked_fill(future, -torch.inf), -1).sum((2, 3))

    def _past(self, seen: Seen, q: Tensor, start: int) -> Part:
        if not start:
            return Part(torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf))
        matter = self.importance(seen, start)
        focal = math.floor(self.focal * start)
        order = torch.argsort(matter.detach(), dim=-1, descending=True, stable=True)
        chosen, rest = order[..., :focal].sort(-1).values, order[..., focal:].sort(-1).values
        groups = rest.shape[-1] // self.group
        whole, apart = groups * self.group, (groups, self.group)
        single = torch.cat((chosen, rest[..., whole:]), -1)
        share = torch.softmax(matter.gather(2, rest[..., :whole]).unflatten(2, apart), -1)[..., None]
        k, v = seen.k[:, :, :start], seen.v[:, :, :start]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for states, kept in ((k, keys), (v, values)):
            pooled = _at(states, rest[..., :whole]).unflatten(2, apart)
            kept.extend((_at(states, single), (share.to(states.dtype) * pooled).sum(3)))
        logits = self.scale * q.unflatten(1, (self.kv_heads, -1)) @ torch.cat(keys, 2)[:, :, None].transpose(-1, -2)
        if self.mass:
            pooled_ones = torch.arange(logits.shape[-1], device=q.device) >= single.shape[-1]
            logits = logits + math.log(self.group) * pooled_ones.to(logits.dtype)
        every = torch.ones(1, single.shape[-1] + groups, dtype=torch.bool, device=q.device)
        part = softmax(logits, every, torch.cat(values, 2)[:, :, None])
        return Part(part.out.flatten(1, 2), part.lse.flatten(1, 2))


def _at(states: Tensor, index: Tensor) -> Tensor:
    return states.gather(2, index[..., None].expand(-1, -1, -1, states.shape[3]))

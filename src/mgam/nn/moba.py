"""MoBA: the blocks whose mean key a query likes best (Lu et al. 2025, arXiv 2502.13189)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.sparse import by_lists


class MobaAttention(SelfAttention):
    """Each query and head reads its own block and the `blocks - 1` complete earlier ones with the best mean key.

    One softmax over them all. The choice takes no gradient. Generation chooses as training does.
    """

    BIDIRECTIONAL = False

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, *, block: int = 64, blocks: int = 3, **base: Any
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        above("block", block, 1)
        above("blocks", blocks, 1)
        self.block, self.blocks = block, blocks

    def attend(self, seen: Seen) -> Tensor:
        """Lists of blocks per query and head."""
        with torch.no_grad():
            own = seen.own // self.block
            chosen = own[:, None].expand(*seen.q.shape[:2], -1, 1)
            complete = seen.k.shape[2] // self.block
            if complete and self.blocks > 1:
                means = seen.k[:, :, : complete * self.block].unflatten(2, (complete, self.block)).mean(3)
                scores = seen.q.unflatten(1, (self.kv_heads, -1)) @ means[:, :, None].transpose(-1, -2)
                past = torch.arange(complete, device=own.device) < own[:, None]
                scores = scores.flatten(1, 2).masked_fill(~past, -torch.inf)
                best = scores.sort(dim=-1, descending=True, stable=True)
                liked = best.indices.masked_fill(best.values == -torch.inf, -1)[..., : self.blocks - 1]
                chosen = torch.cat((chosen, liked), -1)
            index = chosen[..., None] * self.block + torch.arange(self.block, device=own.device)
            index = index.masked_fill(chosen[..., None] < 0, -1).flatten(3)
        return by_lists(seen.q, seen.k, seen.v, seen.first, index, self.scale).out

"""BigBird: window, global and random blocks (Zaheer et al. 2020, arXiv 2007.14062), also causal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.sparse import by_blocks, over_entries


class BigBirdAttention(SelfAttention):
    """Each block of queries reads its neighbours, the first and the last block, and `random` others.

    The random blocks of block c are drawn by a generator seeded with (seed, c), so that they do not depend on call
    borders; causal ones are drawn from the past, and there only the first block is global. Any length is served.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        block: int = 64,
        random: int = 3,
        seed: int = 0,
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        above("block", block, 1)
        above("random", random, 0)
        self.block, self.random, self.seed = block, random, seed

    def plan(self, first: int, last: int, total: int) -> Tensor:
        """Blocks that blocks first ... last-1 of `total` read: (n, 5 + random), -1 where there is none."""
        rows = []
        for number in range(first, last):
            near = [number - 1, number] if self.causal else [number - 1, number, number + 1, total - 1]
            fixed = {one for one in [0, *near] if 0 <= one < total}
            among = [one for one in range(1, number if self.causal else total) if one not in fixed]
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            chosen = torch.randperm(len(among), generator=draw)[: self.random].tolist()
            row = sorted(fixed | {among[one] for one in chosen})
            rows.append(row + [-1] * (5 + self.random - len(row)))
        return torch.tensor(rows)

    def attend(self, seen: Seen) -> Tensor:
        """Blocks of queries over their blocks of keys; the first and the last over everything."""
        tokens, size, device = seen.k.shape[2], self.block, seen.q.device
        begin, total = seen.first // size, -(-tokens // size)
        chosen = self.plan(begin, total, total).to(device)
        lead = seen.first - begin * size
        q = torch.nn.functional.pad(seen.q, (0, 0, lead, 0))
        index = (chosen[:, :, None] * size + torch.arange(size, device=device)).masked_fill(chosen[:, :, None] < 0, -1)

        def see(query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) | (not self.causal)

        out = by_blocks(q, seen.k, seen.v, begin * size, size, index.flatten(1), see, self.scale).out[:, :, lead:]
        if self.causal:
            return out
        last = min(max(size, (total - 1) * size), tokens)
        ends = torch.cat((torch.arange(min(size, tokens)), torch.arange(last, tokens)))
        ends = ends.to(device)
        full = over_entries(seen.q[:, :, ends], seen.k, seen.v, torch.full_like(ends, tokens), self.scale).out
        return out.index_copy(2, ends, full)

"""Local kinds of attention, with one window convention: `window` keys on a side, the query's own included."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.sparse import See, attended_by_blocks, over_all, spans

Kind = Literal["sliding", "strided", "dilated", "blockwise"]
BLOCK = 64
"""Queries that gather their keys together; it changes nothing in the result."""


class LocalAttention(SelfAttention):
    """Attention to a neighbourhood.

    Args:
        kind: `sliding`: the window. `strided`: the window and the tokens 0, `stride`, 2 `stride`, ... of the text, the
            same for all queries: nearer to the `fixed` pattern of Child et al. (2019, arXiv 1904.10509) than to their
            `strided` one, which counts back from each query. `dilated`: `window` tokens at distances of 0, `stride`,
            2 `stride`, ... . `blockwise`: the query's block of `window` tokens and the `exchange` nearest tokens of its
            neighbours (causal: of the past).
        window: keys on a side, the query's own included; `mgam.nn.window_of` converts other conventions.
        global_tokens: leading tokens that all read. Bidirectional ones read all; causal ones read their past.
        recompute: gathers again in the backward pass, so that nothing gathered is kept.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        kind: Kind = "sliding",
        window: int = 64,
        stride: int = 8,
        exchange: int = 0,
        global_tokens: int = 0,
        recompute: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        if kind not in ("sliding", "strided", "dilated", "blockwise"):
            raise SettingError(f"kind={kind!r} is unknown; choose sliding, strided, dilated or blockwise")
        above("window", window, 1)
        above("stride", stride, 1)
        above("global_tokens", global_tokens, 0)
        if not 0 <= exchange <= window:
            raise SettingError(
                f"exchange={exchange} must lie between 0 (plain blocks) and window={window} (neighbours)"
            )
        self.kind, self.window, self.stride, self.exchange = kind, window, stride, exchange
        self.global_tokens, self.recompute = global_tokens, recompute

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Which query position reads which key position."""
        back, size = query - key, self.window
        if self.kind == "blockwise":
            begin = query // size * size
            near = (key >= begin - self.exchange) & (key < begin + size + self.exchange)
        elif self.kind == "dilated":
            near = (back.abs() % self.stride == 0) & (back.abs() // self.stride < size)
        else:
            near = back.abs() < size
            if self.kind == "strided":
                near = near | (key % self.stride == 0)
        near = near | (key < self.global_tokens)
        return near & (back >= 0) if self.causal else near

    def oldest(self, query: int) -> int:
        """First token that queries from this position on may read, besides global ones."""
        if self.kind == "strided":
            return 0
        if self.kind == "blockwise":
            return max(0, query // self.window * self.window - self.exchange)
        return max(0, query - (self.window - 1) * (self.stride if self.kind == "dilated" else 1))

    def keep(self, known: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Keys and values of global tokens, and of those that later queries may read."""
        lead, near = self.global_tokens, tokens - self.oldest(tokens)
        held = known["k"].shape[2]
        if lead + near >= held:
            return known
        return known | {
            name: torch.cat((known[name][:, :, :lead], known[name][:, :, held - near :]), 2) for name in ("k", "v")
        }

    def attend(self, seen: Seen) -> Tensor:
        """Blocks of queries over what any of them may read; global queries over everything."""
        out = self.local(seen, self.sees, seen.q)
        if self.causal or not self.global_tokens:
            return out
        count = min(self.global_tokens, out.shape[2])
        full = over_all(seen.q[:, :, :count], seen.k, seen.v, self.scale)
        return torch.cat((full, out[:, :, count:]), 2)

    def local(self, seen: Seen, see: See, q: Tensor) -> Tensor:
        """What the pattern reads, for queries at the places of the new ones."""
        held, device, lead = seen.k.shape[2], q.device, self.global_tokens
        reach = {"blockwise": self.window + self.exchange, "dilated": self.window * self.stride}
        far = min(reach.get(self.kind, self.window), held)
        first, block = seen.first - seen.gone, min(BLOCK, q.shape[2])
        index = spans(first, q.shape[2], block, far, 0 if self.causal else far, device)
        besides = [torch.arange(min(lead, held), device=device)]
        if self.kind == "strided":
            besides.append(torch.arange(0, held, self.stride, device=device))
        index = torch.cat((index, torch.cat(besides).expand(len(index), -1)), 1)

        def there(query: Tensor, key: Tensor) -> Tensor:
            return see(query + seen.gone, torch.where(key < lead, key, key + seen.gone))

        return attended_by_blocks(q, seen.k, seen.v, first, block, index, there, self.scale, self.recompute)

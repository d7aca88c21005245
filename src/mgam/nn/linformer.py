"""Linformer: keys and values projected along the text to a few rows (Wang et al. 2020, arXiv 2006.04768)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mgam.errors import SettingError
from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.sparse import over_entries


class LinformerAttention(SelfAttention):
    """Softmax over `rank` rows, each a learned sum over all positions.

    It has no causal form: every row holds every position. A text of T tokens takes the first T columns of the
    projections; one longer than `longest` is refused.
    """

    CAUSAL = False

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, *, rank: int = 64, longest: int = 1024, **base: Any
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        above("rank", rank, 1)
        above("longest", longest, 1)
        self.longest = longest
        self.rows_of_keys = nn.Parameter(torch.randn(rank, longest) / longest**0.5)
        self.rows_of_values = nn.Parameter(torch.randn(rank, longest) / longest**0.5)

    def attend(self, seen: Seen) -> Tensor:
        """One softmax over the projected rows."""
        tokens = seen.k.shape[2]
        if tokens > self.longest:
            raise SettingError(
                f"{tokens} tokens were given; this LinformerAttention was made for at most {self.longest}: give less "
                f"text, or train one with longest={tokens}"
            )
        k, v = self.rows_of_keys[:, :tokens] @ seen.k, self.rows_of_values[:, :tokens] @ seen.v
        return over_entries(seen.q, k, v, torch.full_like(seen.own, k.shape[2]), self.scale).out

"""Full attention: what every other module is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgam.nn.base import Seen, SelfAttention


class FullAttention(SelfAttention):
    """Every token reads every token, or its whole past (Vaswani et al. 2017, arXiv 1706.03762)."""

    def attend(self, seen: Seen) -> Tensor:
        """One softmax over all keys."""
        group = self.heads // self.kv_heads
        k, v = (part.repeat_interleave(group, 1) for part in (seen.k, seen.v))
        if not self.causal:
            return F.scaled_dot_product_attention(seen.q, k, v)
        past = torch.arange(k.shape[2], device=k.device) <= seen.own[:, None]
        plain = seen.first == 0
        return F.scaled_dot_product_attention(seen.q, k, v, attn_mask=None if plain else past, is_causal=plain)

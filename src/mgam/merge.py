"""The merge operator: joins attention over separate parts of the past into one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Attention of some queries over one part of what they read.

    Shapes: `out` (..., D), already divided by its own sum; `lse` (...), the log of the sum of exponentials;
    -inf where the part holds nothing that the query may read.
    """

    out: Tensor
    lse: Tensor


def merge(parts: Sequence[Part]) -> Part:
    """Joins parts as if one softmax had run over all their entries.

    Computed in float32 at least. A query that may read nothing in any part gets zeros and `lse` -inf.
    """
    dtype = torch.promote_types(parts[0].out.dtype, torch.float32)
    lse = torch.stack([part.lse.to(dtype) for part in parts])
    peak = lse.amax(0)
    safe = torch.where(torch.isfinite(peak), peak, torch.zeros_like(peak))
    weights = torch.exp(lse - safe)
    total = weights.sum(0)
    shares = weights / total.clamp_min(torch.finfo(dtype).tiny)
    out = torch.zeros_like(parts[0].out, dtype=dtype)
    for share, part in zip(shares, parts, strict=True):
        value = torch.where(share[..., None] > 0, part.out.to(dtype), torch.zeros((), dtype=dtype, device=out.device))
        out = out + share[..., None] * value
    return Part(
        out.to(parts[0].out.dtype), torch.where(total > 0, safe + torch.log(total), total.new_tensor(-torch.inf))
    )

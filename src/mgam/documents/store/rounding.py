"""Rounding to 8 bits: a number in -127 ... 127 for each number, and a step in bfloat16 for all that share one."""

from __future__ import annotations

import torch
from torch import Tensor


def small(states: Tensor, *axes: int) -> tuple[Tensor, Tensor]:
    """Numbers (as `states`) int8 and steps bfloat16, shared along `axes`, which have length 1 in them."""
    wide = states.float()
    most = wide.abs().amax(axes, keepdim=True) if wide.numel() else wide.sum(axes, keepdim=True)
    step = (most / 127).clamp_min(1e-30).to(torch.bfloat16)
    return (wide / step.float()).round().clamp(-127, 127).to(torch.int8), step


def plain(numbers: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """What numbers and steps stand for."""
    return (numbers.float() * step.float()).to(dtype)

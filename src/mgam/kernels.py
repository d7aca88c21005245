"""Whether kernels for devices serve some states; asked of the machine once."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor


def serve(states: Tensor) -> bool:
    """Whether Triton is here and the states are in half precision on a CUDA device."""
    return states.is_cuda and states.dtype in (torch.float16, torch.bfloat16) and installed()


@cache
def installed() -> bool:
    """Whether Triton is here."""
    return importlib.util.find_spec("triton") is not None

"""Whether kernels for devices serve some states; asked of the machine once."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

OLDEST = (8, 0)
"""Compute capability from which on kernels run."""
FLOAT8 = (8, 9)
"""Compute capability from which on they take numbers of eight bits."""


def serve(states: Tensor) -> bool:
    """Whether Triton is here and the states are in half precision on a CUDA device that kernels are made for."""
    half = states.dtype in (torch.float16, torch.bfloat16)
    return states.is_cuda and half and installed() and capability(states.device) >= OLDEST


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@cache
def installed() -> bool:
    """Whether Triton is here."""
    return importlib.util.find_spec("triton") is not None


def cdiv(count: int, size: int) -> int:
    """Parts of `size` that hold `count`. (Triton's own takes the host ten times as long, and launches need many.)"""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def at_once(count: int, most: int, programs: int, places: int, device: torch.device) -> int:
    """How many of `count` blocks, of so many programs each, are launched at a time.

    At most `most`, and such that the last programs of the launches leave the device idle least, where `places` of them
    run on a multiprocessor at a time.
    """
    if count <= most or device.type != "cuda":
        return min(count, most)
    there = places * torch.cuda.get_device_properties(device).multi_processor_count

    def rounds(step: int) -> int:
        whole, left = divmod(count, step)
        return whole * -(-step * programs // there) + -(-left * programs // there)

    launches = -(-count // most)
    return min((-(-count // number) for number in range(launches, launches + 4)), key=rounds)

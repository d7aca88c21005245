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

"""Kernels that follow one another closely: each is launched while the one before it still runs, and waits for its end.

Hopper and newer. A kernel that is chained says at its beginning that its follower may be launched, then waits until all
that came before is done, before it reads or writes anything: what comes out is the same, and the time that a launch
takes passes while the kernel before is at work.
"""

from __future__ import annotations

from functools import cache

import torch
import triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton, by which nothing is chained
    gdc_launch_dependents = gdc_wait = None


def chained(wanted: bool, device: torch.device) -> dict[str, bool]:
    """Options of a launch that is chained where it is `wanted`, and where that is possible."""
    return {"CHAINED": True, "launch_pdl": True} if wanted and _possible(device) else {"CHAINED": False}


@cache
def _possible(device: torch.device) -> bool:
    if gdc_wait is None or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def chain():
    """The first thing that a chained kernel does."""
    gdc_launch_dependents()
    gdc_wait()

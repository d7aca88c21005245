"""Kernels that follow one another closely: each is launched while the one before it still runs, and waits for its end.

Hopper and newer. A kernel that is chained says at its beginning that its follower may be launched, then waits until all
that came before is done, before it reads or writes anything: what comes out is the same, and the time that a launch
takes passes while the kernel before is at work.
"""

from __future__ import annotations

import triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton: nothing is chained
    gdc_launch_dependents = gdc_wait = None

CHAINED = False
"""Whether the kernels of a decode are chained. A script found 5 to 12 microseconds saved a call on an H200, and the
same results; the tests have not run with it there."""


def chained(wanted: bool) -> dict[str, bool]:
    """Options of a launch that is chained where it is `wanted`, and where that is possible."""
    return {"CHAINED": True, "launch_pdl": True} if wanted and CHAINED and gdc_wait else {"CHAINED": False}


@triton.jit
def chain():
    """The first thing that a chained kernel does."""
    gdc_launch_dependents()
    gdc_wait()

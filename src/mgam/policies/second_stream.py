"""Work on a second stream of a device, beside what a call does meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


def begun(work: Callable[[], None], device: torch.device) -> torch.cuda.Event | None:
    """Queues `work` on a second stream, behind all that the current one was given, and returns its end: whoever uses or
    frees what `work` takes or fills lets the current stream wait for that first. None where the work is done at once:
    elsewhere than on CUDA devices, and in a graph that is captured.

    Tensors that `work` takes or fills are made before; what it makes for itself stays with the second stream.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        work()
        return None
    now, beside = torch.cuda.current_stream(device), _second(device)
    beside.wait_stream(now)
    try:
        with torch.cuda.stream(beside):
            work()
    except BaseException:
        now.wait_stream(beside)
        raise
    return beside.record_event()


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    """Its small kernels go before those that wait for room on the device."""
    return torch.cuda.Stream(device, priority=-1)

"""What a figure was measured on: the machine, the software, and the machine's own ceilings in the same run."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Median, fastest and slowest of `repeats` runs, in milliseconds."""

    median: float
    fastest: float
    slowest: float
    repeats: int


@dataclass(frozen=True)
class Machine:
    """The conditions of a run."""

    device: str
    torch: str
    triton: str
    cuda: str
    commit: str
    matmul: float
    """bf16 matrix product of 8192 x 8192 x 8192 on random data, TFLOP/s."""
    copy: float
    """Copy within device memory, bytes read and written, GB/s."""

    def as_dict(self) -> dict[str, str | float]:
        return asdict(self)


def timed(call: Callable[[], object], *, seconds: float = 0.3, most: int = 50, least: int = 3, warm: int = 1) -> Timing:
    """Times calls on the device with events: at least `least` of them, then as many as take `seconds`.

    Calls follow one another without a wait, as the layers of a model do: what the host does counts only where the
    device has nothing left to do.
    """
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    first = _clocked(call, 1)
    count = max(least, min(most, int(seconds * 1000 / max(first[0], 1e-3))))
    found = _clocked(call, count)
    return Timing(statistics.median(found), min(found), max(found), len(found))


def _clocked(call: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of some calls in a row."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairwise(marks)]


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph: launch gaps stay out of the time."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def here(commit: str | None = None) -> Machine:
    """This machine, with its ceilings measured now."""
    import triton

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: left @ right, least=10, warm=3).median
    large = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(large)
    moved = timed(lambda: target.copy_(large), least=10, warm=2).median
    return Machine(
        torch.cuda.get_device_name(),
        torch.__version__,
        triton.__version__,
        torch.version.cuda or "",
        commit or _commit(),
        2 * 8192**3 / product / 1e9,
        2 * large.numel() * 4 / moved / 1e6,
    )


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

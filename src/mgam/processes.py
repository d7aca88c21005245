"""Several processes that share one run, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mgam.errors import MgamError

if TYPE_CHECKING:
    import torch

LONGEST_WAIT = timedelta(days=7)
"""One process may have more to do than another; accelerate's own ten minutes would end the run."""


def world() -> int:
    """Processes that share the run."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def rank() -> int:
    """Number of this process among them; the first one, 0, writes and reports."""
    return int(os.environ.get("RANK", "0"))


def own_device(name: str) -> str:
    """`auto` or `cuda` in one of several processes is a device of its own, where there are any."""
    import torch

    if name in ("auto", "cuda") and world() > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def crew(device: str) -> Any:
    """The processes that share the run, as accelerate knows them; None for one alone.

    Args:
        device: kind of the device that this process computes on (`torch.device.type`).

    Raises:
        MgamError: accelerate is not installed, or sees another number of processes.
    """
    if world() == 1:
        return None
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MgamError("a run over several processes needs accelerate; pip install 'mgam[train]'") from error
    # without `cpu`, accelerate sees no group of processes where there is no accelerator, and waits for none
    found = PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT)
    if found.num_processes != world():
        raise MgamError(
            f"WORLD_SIZE says {world()} processes, accelerate sees {found.num_processes}, so they cannot "
            "share a run; start them with `accelerate launch` or `torchrun`"
        )
    return found


def from_first(value: float, device: torch.device) -> float:
    """The first process's value, in every process: what all must decide alike."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    told = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.broadcast(told, 0)
    return float(told)


def leave() -> None:
    """Ends the group of processes, if there is one: a process that ends without it may be aborted by its threads."""
    if "torch" not in sys.modules or world() == 1:
        return
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""What the first call of a process loads on a GPU, loaded by threads while weights and files are read.

That is Triton's key, a hash of its own libraries (0.4 s), and torch's libraries and kernels, which CUDA loads when they
are first used. Modules of mgam are imported by the thread that calls: two threads must not import each other's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from mgam import kernels
from mgam.threads import quick_turns

Loaded = TypeVar("Loaded")


@contextmanager
def beside(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Loads beside what is done in this context, once a process, and does not wait for it. What fails here fails when
    it is needed, and is told then."""
    if device.type != "cuda":
        yield
        return
    with quick_turns():
        _begun(device, dtype)
        yield


def import_kernels(device: torch.device) -> None:
    """Imports the kernels that questions are read by, which makes Triton's functions of their sources."""
    if device.type == "cuda" and kernels.installed():
        importlib.import_module("mgam.step")


def finish(device: torch.device, dtype: torch.dtype) -> None:
    """Waits until all is loaded."""
    if device.type == "cuda":
        wait(_begun(device, dtype))


def _begun(device: torch.device, dtype: torch.dtype) -> list[Future[Any]]:
    here = device if device.index is not None else torch.device("cuda", _current())
    begun: list[Future[Any]] = [_libraries(here, dtype)]
    return [*begun, _triton()] if kernels.installed() else begun


def _current() -> int:
    """The device that is meant where none is numbered; asked for only where CUDA runs already, else a thread starts
    it."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


@cache
def _libraries(device: torch.device, dtype: torch.dtype) -> Future[Tensor]:
    return _beside(partial(load_libraries, device, dtype))


@cache
def _triton() -> Future[str]:
    return _beside(load_triton)


def _beside(load: Callable[[], Loaded]) -> Future[Loaded]:
    """Runs it in a thread that ends then, so that handles of CUDA's libraries pass to the thread that calls next."""
    thread = ThreadPoolExecutor(1)
    begun = thread.submit(load)
    thread.shutdown(wait=False)
    return begun


def load_triton() -> str:
    """Triton's key, which it looks compiled kernels up by, and what it imports when a kernel is launched."""
    from triton.runtime.cache import triton_key

    key: str = triton_key()
    importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    return key


def load_libraries(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Calls on a few numbers what a model and its reading call."""
    with torch.inference_mode():
        some = torch.ones(16, 64, dtype=dtype, device=device)
        states = some.expand(1, 2, 16, 64).contiguous()
        rows = torch.arange(16, device=device)
        mask = rows[:, None] >= rows
        for queries in (states, states[:, :, :1]):
            functional.scaled_dot_product_attention(queries, states, states, is_causal=queries is states)
        functional.scaled_dot_product_attention(states, states, states, attn_mask=mask)
        full = functional.linear(some[:1], some).float() + functional.linear(some, some).float()
        full = full @ full.T
        full = torch.addcmul(full, full.cos(), full.sin()).pow(2) * torch.rsqrt(full.mean(-1, keepdim=True) + 1)
        full = functional.silu(full).masked_fill(~mask, 0.0).softmax(-1).clamp_min(0.1).to(dtype).float()
        full = torch.cat((full, -full), -1).scatter_add(1, rows[:, None], full[:, :1])
        best = full.topk(4, -1).indices.sort(-1).values.minimum(rows[:, None]) // 2
        found = torch.where(full.gather(1, best) > 0, best, 0).cumsum(-1).clamp(0, 15)
        taken = functional.embedding(found, some).index_select(0, rows)[rows, 0]
        return (taken.sum() + full.max() + full.argmax() + mask.any()).cpu()

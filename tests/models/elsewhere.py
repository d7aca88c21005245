"""Devices that this machine does not have, for tests: tensors that say they lie there and compute on the CPU.

What a real device refuses is refused here too: operands on two devices, and float64 on Apple's MPS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ACROSS = {torch.ops.aten._to_copy.default}
WRITES = {torch.ops.aten.copy_.default}
"""Operations whose operands may lie on two devices."""
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
"""Operations whose indices may lie on the CPU."""
# What may know where a tensor lies; all else in C++ looks for the device's driver.
SEES = {Tensor.device.__get__}  # type: ignore[attr-defined]
REAL = ("cpu", "meta")


class Placed(Tensor):
    """A tensor that says it lies on some device. Its numbers are in `here`, on the CPU."""

    here: Tensor
    hidden = 0
    """Above 0 while C++ runs that would look for the device's driver."""

    @staticmethod
    def __new__(cls, here: Tensor, device: torch.device) -> Placed:
        return Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device="meta", dispatch_device=True,
        )  # fmt: skip

    def __init__(self, here: Tensor, device: torch.device) -> None:
        self.here, self.place = here, device

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            return func(args[0].here, *args[1:], **(kwargs or {}))
        looked = func not in SEES
        Placed.hidden += looked
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        finally:
            Placed.hidden -= looked

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.here}, {self.place})"


class _Mode(TorchDispatchMode):
    """Catches what makes tensors: nothing else tells a device that is not there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Catches `torch.tensor`, which asks a device's driver before anything is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        device = torch.device(options.get("device") or "cpu")
        if func is torch.tensor and device.type not in REAL:
            return Placed(func(*args, **{**options, "device": "cpu"}), device)
        return func(*args, **options)


def where(one: Tensor) -> torch.device:
    """Where a tensor says it lies."""
    return one.place if isinstance(one, Placed) else one.device


def run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """One operation: its operands must lie together; what comes out lies there too."""
    if func is torch.ops.prim.device.default:
        return torch.device("meta") if Placed.hidden else where(args[0])
    flat, _ = tree_flatten((args, kwargs))
    tensors = [one for one in flat if isinstance(one, Tensor)]
    _refuse_apart(func, args[0] if args else None, tensors)
    there = where(args[0]) if func in WRITES else next((where(one) for one in tensors if isinstance(one, Placed)), None)
    place = torch.device(kwargs["device"]) if kwargs.get("device") is not None else there
    options = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
    found = func(*tree_map(_here, args), **tree_map(_here, dict(options)))
    if func._schema.is_mutable and isinstance(args[0], Tensor):
        return args[0]
    return found if place is None or place.type in REAL else tree_map(lambda one: _placed(one, place), found)


def _refuse_apart(func: Any, first: Any, tensors: list[Tensor]) -> None:
    """As a real device does. A number (a tensor without dimensions) may lie anywhere, indices on the CPU."""
    if func in ACROSS or func in WRITES:
        return
    places = {where(one) for one in tensors if one.dim()}
    if func in INDEXED:
        places.discard(torch.device("cpu"))
        places.add(where(first))
    if len(places) > 1:
        raise RuntimeError(f"{func}: operands lie on {' and '.join(map(str, places))}")


def _here(one: Any) -> Any:
    return one.here if isinstance(one, Placed) else one


def _placed(one: Any, place: torch.device) -> Any:
    if not isinstance(one, Tensor):
        return one
    if place.type == "mps" and one.dtype in (torch.float64, torch.complex128):
        raise TypeError(f"MPS has no {one.dtype}")
    return Placed(one, place)


@contextmanager
def devices() -> Iterator[None]:
    """While it lasts, devices that are not there can be named."""
    with _Mode(), _Made():
        yield


def put(module: nn.Module, device: str) -> None:
    """Moves a module's weights and buffers."""
    place = torch.device(device)
    for part in module.modules():
        for name, one in part._parameters.items():
            if one is not None and not isinstance(one, Placed):
                part._parameters[name] = Placed(one.detach(), place)
        for name, one in part._buffers.items():
            if one is not None and not isinstance(one, Placed):
                part._buffers[name] = Placed(one, place)

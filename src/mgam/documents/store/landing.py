"""Where what stays in memory of a segment comes to, used for one after the other: main memory, or a GPU's.

A GPU gets it piece by piece through a little pinned memory: while one piece is sent, the next is read and hashed.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from mgam.documents.store.layout import Layout

PIECE = 2**22
"""Bytes read and hashed at a time: they are in the processor's cache still when they are hashed."""


class Landing:
    """Main memory for one segment at a time."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def begin(self, layout: Layout) -> None:
        """Makes room for a segment; what was here before is written over."""
        if len(self._memory) < layout.pages_begin:
            self._memory = bytearray(layout.pages_begin)

    def piece(self, first: int, last: int) -> memoryview:
        """Where to read bytes [first, last) to, which are a piece."""
        return memoryview(self._memory)[first:last]

    def keep(self, first: int, last: int) -> None:
        """The piece was read."""

    def held(self, layout: Layout) -> tuple[memoryview, Tensor | None]:
        """What can be read on the CPU, from the first byte on; and all bytes on another device."""
        return memoryview(self._memory)[: layout.pages_begin], None


class DeviceLanding(Landing):
    """Memory of a device for one segment at a time. Whole numbers stay in main memory too, where they are used.

    Made by the thread that will read what is held, on the stream on which it does.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._moved = torch.empty(0, dtype=torch.uint8, device=device)
        gpu = device.type == "cuda"
        self._reader = torch.cuda.current_stream(device) if gpu else None
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._sent = [torch.cuda.Event() for _ in range(2)] if gpu else []
        self._staged: Tensor | None = None
        self._numbers = 0

    def begin(self, layout: Layout) -> None:
        self._numbers = layout.numbers_end
        if len(self._memory) < self._numbers:
            self._memory = bytearray(self._numbers)
        if self._staged is None:
            self._staged = torch.empty(2, PIECE, dtype=torch.uint8, pin_memory=self._stream is not None)
        with torch.cuda.stream(self._reader) if self._reader is not None else nullcontext():
            if len(self._moved) < layout.pages_begin:
                self._moved = torch.empty(layout.pages_begin, dtype=torch.uint8, device=self._device)
                if self._stream is not None:
                    self._moved.record_stream(self._stream)  # a reading that fails waits for no copy
        if self._stream is not None and self._reader is not None:
            self._stream.wait_stream(self._reader)  # which may be reading what was held before

    def piece(self, first: int, last: int) -> memoryview:
        half = first // PIECE % 2
        if self._sent:
            self._sent[half].synchronize()
        return memoryview(self._piece(first, last).numpy())  # type: ignore[arg-type]

    def keep(self, first: int, last: int) -> None:
        part = self._piece(first, last)
        if first < self._numbers:
            end = min(last, self._numbers)
            self._memory[first:end] = memoryview(part.numpy())[: end - first]  # type: ignore[arg-type]
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            self._moved[first:last].copy_(part, non_blocking=self._stream is not None)
        if self._stream is not None:
            self._sent[first // PIECE % 2].record(self._stream)

    def held(self, layout: Layout) -> tuple[memoryview, Tensor | None]:
        if self._stream is not None:
            self._stream.synchronize()
        return memoryview(self._memory)[: self._numbers], self._moved[: layout.pages_begin]

    def _piece(self, first: int, last: int) -> Tensor:
        assert self._staged is not None
        return self._staged[first // PIECE % 2, : last - first]


def landing_on(device: torch.device) -> Landing:
    """Landing on a device."""
    return Landing() if device.type == "cpu" else DeviceLanding(device)

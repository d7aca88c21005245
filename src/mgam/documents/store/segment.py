"""Writing a segment and reading what stays in memory of it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mgam.documents.store import files, rounding
from mgam.documents.store.landing import PIECE, Landing
from mgam.documents.store.layout import CODES, SIZES, Layout, Place
from mgam.documents.store.pages import checksums
from mgam.errors import DigestError

Numbers = NDArray[Any]
"""An array of whole numbers or truth values."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "U32": torch.uint32, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip


@dataclass(frozen=True)
class LayerPart:
    """What one layer puts into a segment.

    Shapes: pages (C, H, page_bytes) uint8; keys[l-1], values[l-1] (H, n//size[l], D); search (H, S, C, D); rest
    (2, H, r, D): keys and values of the tokens after the last complete chunk; recent (Hq, R, D). With 8 bits keys,
    values and search are int8, and `steps` (H, D) has a step for each by its name in the layout.
    """

    pages: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    search: Tensor
    rest: Tensor
    recent: Tensor
    steps: Mapping[str, Tensor] = field(default_factory=dict)

    def on_cpu(self) -> LayerPart:
        """The same in main memory."""
        keys, values = ([states.cpu() for states in level] for level in (self.keys, self.values))
        steps = {name: step.cpu() for name, step in self.steps.items()}
        return LayerPart(self.pages.cpu(), keys, values, self.search.cpu(), self.rest.cpu(), self.recent.cpu(), steps)


@dataclass(frozen=True)
class TokenPart:
    """The tokens of a segment: ids (n,), the text each is of (n,), -1 for none, and its characters there (n, 2)."""

    ids: Numbers
    texts: Numbers
    offsets: Numbers


def write(folder: Path, name: str, layout: Layout, tokens: TokenPart, layer: Callable[[int], LayerPart]) -> str:
    """Writes a segment, one layer in memory at a time, and returns the checksum of all that stands before the pages.

    Raises:
        DigestError: the disk is full, or the folder may not be written; then there is no such file.
    """
    head = bytearray(layout.pages_begin)
    head[: len(layout.header)] = layout.header

    def put(tensor: str, data: bytes | memoryview) -> None:
        place = layout.places[tensor]
        if len(data) != place.bytes:
            raise ValueError(f"{tensor} has {len(data)} bytes, {place.bytes} belong there")
        head[place.begin : place.end] = data

    put("ids", tokens.ids.astype("<i4").tobytes())
    put("texts", tokens.texts.astype("<i4").tobytes())
    put("offsets", tokens.offsets.astype("<i8").tobytes())
    with files.whole_file(folder, name) as descriptor:
        for index in range(layout.shape.layers):
            part = layer(index)
            place = layout.places[f"layers.{index}.pages"]
            if part.pages.numel() != place.bytes:
                raise ValueError(f"pages of layer {index} have {part.pages.numel()} bytes, {place.bytes} belong there")
            files.write_at(descriptor, bytes_of(part.pages), place.begin)
            put(f"layers.{index}.checks", checksums(part.pages).astype("<u4").tobytes())
            for level, (keys, values) in enumerate(zip(part.keys, part.values, strict=True), start=1):
                put(f"layers.{index}.keys.{level}", raw(keys))
                put(f"layers.{index}.values.{level}", raw(values))
            for kind in ("search", "rest", "recent"):
                put(f"layers.{index}.{kind}", raw(getattr(part, kind)))
            for name, step in part.steps.items():
                put(f"layers.{index}.{name}.step", raw(step))
        files.write_at(descriptor, memoryview(head), 0)
        if files.size_of(descriptor) < layout.bytes:  # the last pages may be none
            os.ftruncate(descriptor, layout.bytes)
    return hashlib.sha256(head).hexdigest()


def bytes_of(pages: Tensor) -> memoryview:
    """The memory of a contiguous tensor of bytes on the CPU."""
    return memoryview(pages.contiguous().numpy().reshape(-1))  # type: ignore[arg-type]


def raw(states: Tensor) -> bytes:
    """The bytes of a tensor."""
    return states.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if states.numel() else b""


def check_size(descriptor: int, layout: Layout, path: Path) -> None:
    """Compares size and header with what the manifest calls for, before memory is taken.

    Raises:
        DigestError: they differ.
    """
    size = files.size_of(descriptor)
    if size != layout.bytes:
        raise DigestError(
            f"{path} has {size:,} bytes and must have {layout.bytes:,}: it is damaged or of another digest"
        )
    found = bytearray(len(layout.header))
    if files.read_at(descriptor, memoryview(found), 0) != len(found) or bytes(found) != layout.header:
        raise DigestError(f"{path} has another header than its digest calls for: it is damaged or foreign")


def read_head(descriptor: int, layout: Layout, sha256: str, path: Path, landing: Landing) -> Resident:
    """All that stands before the pages, at a landing that is used again for the next segment.

    Raises:
        DigestError: it does not fit its checksum, or ends early.
    """
    landing.begin(layout)
    found = hashlib.sha256()
    for first in range(0, layout.pages_begin, PIECE):
        last = min(first + PIECE, layout.pages_begin)
        piece = landing.piece(first, last)
        try:
            got = files.read_at(descriptor, piece, first)
        except OSError as error:
            raise DigestError(f"{path} cannot be read: {error.strerror}") from error
        found.update(piece[:got])
        landing.keep(first, last)
    if found.hexdigest() != sha256:
        raise DigestError(
            f"{path} is damaged between byte 0 and {layout.pages_begin:,} (tokens, summaries or search keys); "
            "digest the texts again, or take the segment from a copy"
        )
    return Resident(*landing.held(layout), layout)


@dataclass(frozen=True)
class Resident:
    """The tensors of a segment that stand before its pages."""

    data: memoryview
    """On the CPU: all of it, or the whole numbers, which come first, where all is on another device."""
    moved: Tensor | None
    """All of it on another device."""
    layout: Layout

    @cached_property
    def _whole(self) -> Tensor:
        return torch.frombuffer(self.data, dtype=torch.uint8) if self.moved is None else self.moved

    def __getitem__(self, name: str) -> Tensor:
        place: Place = self.layout.places[name]
        if not place.bytes:
            return torch.empty(place.shape, dtype=DTYPES[place.code], device=self._whole.device)
        return self._whole[place.begin : place.end].view(DTYPES[place.code]).view(place.shape)

    def across(self, kind: str) -> Tensor:
        """A tensor of every layer (layers, ...) at once: one look instead of many."""
        layers, first = self.layout.shape.layers, self.layout.places[f"layers.0.{kind}"]
        last = self.layout.places[f"layers.{layers - 1}.{kind}"]
        numbers = DTYPES[first.code]
        if not first.bytes:
            return torch.empty((layers, *first.shape), dtype=numbers, device=self._whole.device)
        step = (last.begin - first.begin) // max(layers - 1, 1) // SIZES[first.code]
        inner = [math.prod(first.shape[axis + 1 :]) for axis in range(len(first.shape))]
        flat = self._whole[first.begin : last.end].view(numbers)
        return flat.as_strided((layers, *first.shape), (step, *inner))

    def states(self, kind: str) -> Tensor:
        """Summaries or search keys of every layer, (layers, H, ..., D), as they are read."""
        found, shape = self.across(kind), self.layout.shape
        if shape.bits != 8:
            return found
        step = self.across(f"{kind}.step")
        step = step.reshape(*step.shape[:2], *(1,) * (found.dim() - 3), step.shape[-1])
        return rounding.plain(found, step, DTYPES[shape.search_code if kind == "search" else CODES[shape.dtype]])

    def numbers(self, name: str) -> Numbers:
        """A tensor of whole numbers, as a copy that outlives the rest."""
        return replace(self, moved=None)[name].numpy().copy()

    def checks(self) -> Numbers:
        """Checksums of pages (layers, C, H), as a copy that outlives the rest."""
        return replace(self, moved=None).across("checks").contiguous().clone().numpy()

"""Verifying a digest: every byte of it, without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mgam.documents.store import files, neutral
from mgam.documents.store.layout import Layout
from mgam.documents.store.manifest import Manifest
from mgam.documents.store.pages import checksums
from mgam.documents.store.segment import Resident, bytes_of
from mgam.documents.store.store import Store, damaged_page
from mgam.errors import DigestError


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    file: str
    message: str


def verify(folder: Path, on_progress: Callable[[int, int], None] | None = None) -> list[Fault]:
    """Everything that is wrong with a digest; none: every byte is as it was written.

    Raises:
        DigestError: the folder is no digest, or its manifest cannot be read.
    """
    store = Store(folder, Manifest.read(folder))
    parts = store.manifest.segments
    faults = []
    for number, text in enumerate(store.manifest.texts):
        try:
            store.text(number)
        except (DigestError, UnicodeDecodeError) as error:
            faults.append(Fault(text.file, str(error)))
    for number, part in enumerate(parts):
        try:
            faults += [Fault(part.file, message) for message in _pages(store, number, store.resident(number))]
        except DigestError as error:
            faults.append(Fault(part.file, str(error)))
        if on_progress is not None:
            on_progress(number + 1, len(parts))
    store.close()
    if wrong := neutral.fault(folder, store.manifest):
        faults.append(Fault(neutral.NAME, wrong))
    return faults


def _pages(store: Store, number: int, found: Resident) -> Iterator[str]:
    """What is said of each damaged page of a segment."""
    layout: Layout = found.layout
    descriptor = store.descriptor(number)
    for layer in range(layout.shape.layers):
        place = layout.places[f"layers.{layer}.pages"]
        data = torch.empty(layout.chunks, layout.shape.heads, layout.shape.page_bytes, dtype=torch.uint8)
        if place.bytes and files.read_at(descriptor, bytes_of(data), place.begin) != place.bytes:
            yield f"{store.path(number)} ends before byte {place.end:,}"
            continue
        wrong = checksums(data) != found.numbers(f"layers.{layer}.checks")
        for chunk, head in np.argwhere(wrong).tolist():
            begin = layout.page(layer, chunk, head)
            whole = chunk + store.manifest.segments[number].first // layout.shape.levels.chunk
            yield damaged_page(store.path(number), begin, layout.shape.page_bytes, layer, whole, head)

"""A digest on disk as readers see it: its manifest, its texts, its segments, its pages."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mgam.documents.sources import read_source
from mgam.documents.store import files, segment
from mgam.documents.store.landing import Landing, landing_on
from mgam.documents.store.manifest import Manifest, Segment, Text
from mgam.documents.store.segment import Numbers, Resident
from mgam.errors import DigestError, MgamError

OPEN_FILES = 200
READERS = 8
DEVICE_READERS = 16
"""On a device more of them pay: what they read passes through little pinned memory."""
AHEAD_BYTES = 1 << 30
"""Memory of a device that segments which are read ahead take at most, two of them aside."""
PAGES_EACH = 32
"""Pages that one reader takes at a time: a disk is asked for several things at once."""


class Row(NamedTuple):
    """A page to read: of chunk `inside` of a segment and a KV head, at a place in the file, into memory."""

    segment: int
    inside: int
    head: int
    offset: int
    view: memoryview


class Store:
    """An open digest. Sizes and headers are compared when it is opened; pages are checked when first read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._descriptors: dict[int, int] = {}
        self._checks: list[Numbers] = []
        self._checked: list[Numbers] = []
        self._readers: ThreadPoolExecutor | None = None

    @classmethod
    def open(cls, folder: Path) -> Store:
        """The digest in a folder.

        Raises:
            DigestError: it is none, or sizes or headers do not fit.
        """
        store = cls(folder, Manifest.read(folder))
        for number in range(len(store.manifest.segments)):
            store.descriptor(number)
        return store

    def close(self) -> None:
        """Closes its files."""
        if self._readers is not None:
            self._readers.shutdown()
            self._readers = None
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __del__(self) -> None:
        self.close()

    def path(self, number: int) -> Path:
        """The file of a segment."""
        return self.folder / self.manifest.segments[number].file

    def descriptor(self, number: int) -> int:
        """The open file of a segment, its size and header compared."""
        found = self._descriptors.pop(number, None)
        if found is None:
            while len(self._descriptors) >= OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            part = self.manifest.segments[number]
            found = files.open_for_reading(self.folder, part.file)
            try:
                segment.check_size(found, self.manifest.layout(part), self.folder / part.file)
            except BaseException:
                os.close(found)
                raise
        self._descriptors[number] = found
        return found

    def text(self, number: int) -> str:
        """A text that was digested.

        Raises:
            DigestError: it is missing or damaged.
        """
        text = self.manifest.texts[number]
        data = files.read_small(self.folder, text.file, text.bytes)
        if len(data) != text.bytes or hashlib.sha256(data).hexdigest() != text.sha256:
            raise DigestError(
                f"{self.folder / text.file}, the text of {text.name}, is damaged: its checksum does not fit"
            )
        return data.decode()

    @contextmanager
    def residents(self, device: torch.device) -> Iterator[Iterator[tuple[Segment, Resident]]]:
        """Every segment with what stays in memory of it, in order, on a device.

        A few are read ahead, from the moment of this call on. What is handed out counts until the next one is asked
        for: its memory is used again.

        Raises:
            DigestError: one is damaged.
        """
        workers = min(READERS if device.type == "cpu" else DEVICE_READERS, os.cpu_count() or 1)

        def hand_out(waiting: deque[tuple[Landing, Future[Resident]]]) -> Iterator[tuple[Segment, Resident]]:
            for number, part in enumerate(self.manifest.segments):
                landing, reading = waiting.popleft()
                found = reading.result()
                self.learn_checks(number, found)
                yield part, found
                if number + ahead < len(self.manifest.segments):
                    waiting.append((landing, readers.submit(self.resident, number + ahead, landing)))

        ahead = min(workers + 1, len(self.manifest.segments))
        if device.type != "cpu" and ahead:
            largest = max(self.manifest.layout(part).pages_begin for part in self.manifest.segments)
            ahead = min(ahead, max(2, AHEAD_BYTES // largest))
        landings = [landing_on(device) for _ in range(ahead)]
        readers = ThreadPoolExecutor(workers)
        try:
            yield hand_out(deque((one, readers.submit(self.resident, n, one)) for n, one in enumerate(landings)))
        finally:
            readers.shutdown(cancel_futures=True)

    def resident(self, number: int, landing: Landing | None = None) -> Resident:
        """What stays in memory of a segment, checked; at a landing where one is given."""
        part = self.manifest.segments[number]
        descriptor = files.open_for_reading(self.folder, part.file)
        try:
            layout = self.manifest.layout(part)
            segment.check_size(descriptor, layout, self.path(number))
            return segment.read_head(descriptor, layout, part.sha256, self.path(number), landing or Landing())
        finally:
            os.close(descriptor)

    def learn_checks(self, number: int, found: Resident) -> None:
        """Keeps the checksums of a segment's pages, which come with what was checked already."""
        del self._checks[number:], self._checked[number:]
        shape = self.manifest.shape
        self._checks.append(found.checks())
        self._checked.append(np.zeros((shape.layers, found.layout.chunks, shape.heads), np.bool_))

    def read_pages(self, layer: int, heads: Numbers, chunks: Numbers, pages: Tensor) -> None:
        """Reads pages (n, page_bytes) uint8 of chunks (n,) of KV heads (n,).

        The system is told of all before the first is read: a disk answers sooner when it is asked for several at once.

        Raises:
            DigestError: a page is damaged; names file and offset.
        """
        shape = self.manifest.shape
        numbers, insides = np.divmod(chunks, self.manifest.grid // shape.levels.chunk)
        there, which = np.unique(numbers, return_inverse=True)
        begin = [self.manifest.layout(self.manifest.segments[n]).page(layer, 0, 0) for n in there.tolist()]
        offsets = np.array(begin, np.int64)[which] + (insides * shape.heads + heads) * shape.page_bytes
        views = [memoryview(page) for page in pages.numpy()]
        columns = (numbers.tolist(), insides.tolist(), heads.tolist(), offsets.tolist(), views)
        rows = [Row(*row) for row in zip(*columns, strict=True)]
        if len(there) > OPEN_FILES:
            for row in rows:
                self._read_page(layer, row, self.descriptor(row.segment))
            return
        opened = {number: self.descriptor(number) for number in there.tolist()}
        for row in rows if len(rows) > 1 else ():
            files.will_read(opened[row.segment], row.offset, shape.page_bytes)
        if len(rows) < PAGES_EACH * 2:
            for row in rows:
                self._read_page(layer, row, opened[row.segment])
            return
        parts = [rows[first : first + PAGES_EACH] for first in range(0, len(rows), PAGES_EACH)]

        def read_part(part: list[Row]) -> None:
            for row in part:
                self._read_page(layer, row, opened[row.segment])

        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS)
        reading = [self._readers.submit(read_part, part) for part in parts]
        wait(reading)  # also where one fails: none may go on writing to pages that are used for something else
        for done in reading:
            done.result()

    def _read_page(self, layer: int, row: Row, descriptor: int) -> None:
        """Fills a view with a page of a segment, checked when it is first read."""
        number, inside, head, offset, view = row
        try:
            got = files.read_at(descriptor, view, offset)
        except OSError as error:
            raise DigestError(f"{self.path(number)} cannot be read at byte {offset:,}: {error.strerror}") from error
        if got == len(view) and self._checked[number][layer, inside, head]:
            return
        if got != len(view) or zlib.crc32(view) != self._checks[number][layer, inside, head]:
            chunk = number * (self.manifest.grid // self.manifest.shape.levels.chunk) + inside
            raise DigestError(damaged_page(self.path(number), offset, len(view), layer, chunk, head))
        self._checked[number][layer, inside, head] = True


def damaged_page(path: Path, offset: int, length: int, layer: int, chunk: int, head: int) -> str:
    """What is said of a damaged page."""
    return (
        f"{path} is damaged between byte {offset:,} and {offset + length:,} (keys and values of layer {layer}, "
        f"KV head {head}, chunk {chunk}); take it from a copy, or digest the texts again; `mgam verify` lists all "
        "damage"
    )


def write_text(folder: Path, number: int, name: str, text: str) -> Text:
    """Keeps a text with its digest."""
    data = text.encode()
    files.write_small(folder, Text.file_of(number), data)
    return Text(name, Text.file_of(number), len(data), hashlib.sha256(data).hexdigest())


def changed(manifest: Manifest) -> list[str]:
    """Names of texts whose files are still there and hold something else than was digested."""
    found = []
    for text in manifest.texts:
        try:
            if Path(text.name).is_file() and Text.hash(read_source(text.name).text) != text.sha256:
                found.append(text.name)
        except (MgamError, OSError, ValueError):
            found.append(text.name)
    return found

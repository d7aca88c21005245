"""The writer's lock: one writer at a time; it goes when its process goes, however that ends."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from mgam.documents.store.files import explained
from mgam.errors import DigestError

NAME = "writer.lock"


class WriterLock:
    """Held while a digest is written; readers need none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> WriterLock:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with explained(self.folder):
            self._descriptor = os.open(self.folder / NAME, flags, 0o666)
        try:
            _lock(self._descriptor)
        except OSError as error:
            os.close(self._descriptor)
            self._descriptor = None
            raise DigestError(f"{self.folder} is being written by another process; wait until it is done") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # which also unlocks
            self._descriptor = None


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

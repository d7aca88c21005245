"""Files of a digest: opened inside their folder only, never through a link, written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgam.errors import DigestError

TEMPORARY = ".part"
"""Ending of a file that is being written."""

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a pipe in place of a file must not make a reader wait


def refuse_link(path: Path) -> None:
    """Refuses a symbolic link.

    Raises:
        DigestError: it is one.
    """
    if path.is_symlink():
        raise DigestError(f"{path} is a symbolic link, and links are not followed; name the folder itself")


def open_for_reading(folder: Path, name: str) -> int:
    """A descriptor of a plain file in the folder.

    Raises:
        DigestError: missing, a link, not a plain file, not permitted.
    """
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_LINKS | _NO_WAIT)
    except FileNotFoundError as error:
        raise DigestError(f"{folder} lacks {name}: it is not a whole digest; run `mgam verify` on it") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise DigestError(f"{path} is a symbolic link, and links are not followed") from error
        raise DigestError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DigestError(f"{path} is not a plain file")
    return descriptor


def size_of(descriptor: int) -> int:
    """Bytes in an open file."""
    return os.fstat(descriptor).st_size


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fills a buffer from a place in a file and returns how many bytes were there."""
    if not hasattr(os, "preadv"):  # Windows
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(buffer))
        buffer[: len(data)] = data
        return len(data)
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not got:
            break
        done += got
    return done


def will_read(descriptor: int, offset: int, length: int) -> None:
    """Tells the system what will be read next, so that it begins at once and with several things at a time."""
    if hasattr(os, "posix_fadvise"):  # else it is read when it is read
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def read_small(folder: Path, name: str, most: int) -> bytes:
    """All of a file of at most `most` bytes.

    Raises:
        DigestError: it cannot be read, or is larger.
    """
    descriptor = open_for_reading(folder, name)
    try:
        size = size_of(descriptor)
        if size > most:
            raise DigestError(
                f"{folder / name} has {size:,} bytes, at most {most:,} are expected; the digest is damaged"
            )
        data = bytearray(size)
        try:
            got = read_at(descriptor, memoryview(data), 0)
        except OSError as error:
            raise DigestError(f"{folder / name} cannot be read: {error.strerror}") from error
        return bytes(data[:got])
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(folder: Path, name: str) -> Iterator[int]:
    """A descriptor to write to; the file appears under its name when all is on disk, or not at all.

    Raises:
        DigestError: the disk is full, the folder may not be written.
    """
    part = folder / (name + TEMPORARY)
    with explained(folder):
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINKS, 0o666)
        try:
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(part, folder / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(folder)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at a place in a file."""
    view = memoryview(data)
    while len(view):
        if hasattr(os, "pwrite"):
            done = os.pwrite(descriptor, view, offset)
        else:  # Windows
            os.lseek(descriptor, offset, os.SEEK_SET)
            done = os.write(descriptor, view)
        view = view[done:]
        offset += done


def write_small(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file by these bytes, at once for every reader."""
    with whole_file(folder, name) as descriptor:
        write_at(descriptor, data, 0)


def sync_folder(folder: Path) -> None:
    """Makes names in a folder last through a loss of power."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns errors of writing into words that a person can act on."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full:
            raise DigestError(
                f"no room to write in {folder} ({error.strerror}); what was digested so far is kept: make room and run "
                "the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DigestError(f"{folder} may not be written by you ({error.strerror}); choose another place") from error
        raise DigestError(f"{folder} cannot be written: {error.strerror or error}") from error

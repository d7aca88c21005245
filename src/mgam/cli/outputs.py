"""Where results go: refused before the work, if they cannot be written there."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from mgam.errors import SettingError


def require_place(option: str, path: Path, *, folder: bool = False) -> None:
    """Tries whether a file, or a folder, can be written at `path`; leaves nothing behind.

    Raises:
        SettingError: it cannot; says which option named it.
    """
    if folder and path.exists() and not path.is_dir():
        raise SettingError(f"{option} {path} is a file, and a folder is wanted; name another")
    if not folder and path.is_dir():
        raise SettingError(f"{option} {path} is a folder, and a file is wanted; name another")
    place = path.absolute()
    there = next(one for one in (place, *place.parents) if one.exists() and (folder or one != place))
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise SettingError(f"{option} {path} cannot be written ({error.strerror}); name another") from error

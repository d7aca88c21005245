"""Where mgam keeps what it derived from a user's files: never in the project, never in the files' own folders."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for mgam; it need not exist yet.

    `XDG_CACHE_HOME` wins on every system; else the platform's own place.
    """
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home).expanduser() / "mgam"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mgam"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "mgam" / "cache"
    return Path.home() / ".cache" / "mgam"


def models_folder() -> Path:
    """Where unpacked models lie, one folder each, named by what they were unpacked from."""
    return cache_folder() / "models"

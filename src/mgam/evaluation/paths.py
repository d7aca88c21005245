"""Where evaluation keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$MGAM_CACHE`, else `mgam` in the user's cache directory."""
    named = os.environ.get("MGAM_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mgam"


def replace_file(path: Path, text: str) -> None:
    """Writes `text` so that a reader, or a run killed half-way, never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

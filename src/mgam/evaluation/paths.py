"""Files that evaluation can make or fetch again, in the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from mgam.integrations.cache import cache_folder


def texts_folder() -> Path:
    """Real text that `mgam data fetch` has brought."""
    return cache_folder() / "texts"


def samples_folder() -> Path:
    """Samples that were built."""
    return cache_folder() / "samples"


def results_folder() -> Path:
    """Results of runs that no `--results` file was named for."""
    return cache_folder() / "results"


def replace_file(path: Path, text: str) -> None:
    """Writes `text` so that a reader, or a run killed half-way, never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

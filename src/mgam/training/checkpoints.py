"""Checkpoints that are whole: a run that was killed while it wrote one goes on from the one before."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

NAME = re.compile(r"checkpoint-(\d+)")
WANTED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; None where there is none."""
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        if whole(path):
            return path
    return None


def whole(checkpoint: Path) -> bool:
    """Whether everything is there that Trainer goes on from: what it writes last is its state."""
    if not all((checkpoint / name).is_file() for name in WANTED):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
            list(file.keys())
    except (OSError, ValueError, SafetensorError):
        return False
    return True

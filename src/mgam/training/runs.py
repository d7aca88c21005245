"""Runs in folders: what a run is, going on with it, and stopping in words when it cannot go on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mgam.errors import MgamError, SettingError
from mgam.processes import crew
from mgam.training.checkpoints import last_whole

RUN = "run.json"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
UNWRITTEN = re.compile(r"PytorchStreamWriter|writing file|No space left|File too large|unexpected pos", re.IGNORECASE)
"""What torch says when a file cannot be written: it raises no OSError."""


class FittingError(MgamError):
    """Fitting stopped; the message says where, why, and what was kept."""


class NotANumberError(FittingError):
    """The loss is no number any more."""


def open_run(place: Path, what: Mapping[str, Any], resume: bool, device: torch.device) -> None:
    """Notes what a run is, or checks that it is the one that is there; the first of several processes writes.

    Raises:
        SettingError: another run is there, or any if `resume` is off; or the folder cannot be written.
    """
    several = crew(device.type)
    first = several is None or several.is_main_process
    with nullcontext() if several is None else several.main_process_first():
        _open(place, what, resume or not first)


def _open(place: Path, what: Mapping[str, Any], resume: bool) -> None:
    run = json.loads(json.dumps(what))
    path = place / RUN
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if not resume or there != run:
            differing = [name for name in run if not isinstance(there, dict) or there.get(name) != run[name]]
            said = f" of another {' and other '.join(differing)}" if differing else ""
            raise SettingError(f"{place} holds a fit{said}; give a new folder with -o")
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingError(f"{place} cannot be written ({error}); give another folder with -o") from error


@contextmanager
def saying_why(place: Path, rate: float) -> Iterator[None]:
    """Turns what stops a run into words.

    Raises:
        FittingError: the loss is no number any more, or the disk is full; says what was kept.
    """
    try:
        yield
    except NotANumberError as error:
        raise NotANumberError(
            f"{error}; the last good checkpoint is {last_whole(place / CHECKPOINTS)}. Fit anew, into another folder, "
            f"with a lower --rate ({rate} now) or another --seed"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not UNWRITTEN.search(str(error)):
            raise
        raise FittingError(
            f"fitting stopped, since {place} could not be written ({error}); the last whole checkpoint is "
            f"{last_whole(place / CHECKPOINTS)}. Make room and call it again: it goes on from there"
        ) from error

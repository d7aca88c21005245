"""The runs of the table in the order in which they tell most, and who makes which."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mgam.evaluation.machine import commit
from papertable.library import Library
from papertable.models import ABLATIONS, FAR, MODELS
from papertable.sizes import Size
from papertable.train import Run, train

SEEDS, ABLATION_SEEDS, TUNING_SEED = 3, 2, 100
ABLATED = "hop"
HOPE = 0.7
"""Of the time that others of its kind took, what a run may take where fewer share the device."""
COMMIT = commit()
SLOWEST_FIRST = tuple(reversed(MODELS))
"""So that processes that share a machine end at about the same time."""


def plan(size: Size) -> list[Run]:
    """Rates for each model, seeds of all, ablations, lengths mixed, what must be read afar. A rate of 0 is yet to be
    chosen."""
    runs = [
        Run(f"tune-{model}-{rate:g}", model, rate, TUNING_SEED, size, tuning=True)
        for model in SLOWEST_FIRST for rate in size.rates
    ]  # fmt: skip
    runs += [Run(f"{model}-{seed}", model, 0.0, seed, size) for seed in range(SEEDS) for model in SLOWEST_FIRST]
    runs += [
        Run(f"ablation-{name.replace(' ', '-')}-{seed}", "mgam", 0.0, seed, size, (ABLATED,), changes,
            steps=max(1, size.steps // 2))
        for seed in range(ABLATION_SEEDS) for name, changes in ABLATIONS.items()
    ]  # fmt: skip
    runs += [
        Run(f"mixed-{model}-{seed}", model, 0.0, seed, size, mixed=True)
        for seed in range(SEEDS) for model in SLOWEST_FIRST
    ]  # fmt: skip
    return runs + [
        Run(f"far-{name.replace(' ', '-')}-{seed}", model, 0.0, seed, size, ("far",), changes,
            steps=max(1, size.steps // 2), mixed=True)
        for seed in range(ABLATION_SEEDS)
        for name, (model, changes) in FAR.items()
    ]  # fmt: skip


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What is finished, by name of the run."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))}


def dev_score(result: dict[str, Any]) -> float:
    """Mean of pooled accuracy and F1; below all others where the loss diverged."""
    if result["diverged"] is not None:
        return -1.0
    pools = [pooled(result["test"]["scores"], figure) for figure in ("accuracy", "f1")]
    return statistics.mean(value for value in pools if value is not None)


def pooled(scores: dict[str, dict[str, dict[str, float]]], figure: str, length: str | None = None) -> float | None:
    """Mean over tasks and lengths that have the figure, each cell with equal weight; of one length, if given."""
    cells = [
        cell[figure]
        for lengths in scores.values() for own, cell in lengths.items()
        if figure in cell and length in (None, own)
    ]  # fmt: skip
    return statistics.mean(cells) if cells else None


def chosen_rate(model: str, size: Size, done: dict[str, dict[str, Any]], missing: int = 0) -> float | None:
    """The rate with the best dev score, the lowest of equal ones; None while more than `missing` are not finished."""
    found = [(rate, done.get(f"tune-{model}-{rate:g}")) for rate in sorted(size.rates)]
    finished = [(rate, result) for rate, result in found if result is not None]
    if len(finished) < max(1, len(found) - missing):
        return None
    return max(finished, key=lambda pair: dev_score(pair[1]))[0]


def ready(size: Size, folder: Path, only: str, missing: int = 0) -> Iterator[tuple[Run, bool]]:
    """Runs that are not finished, as `only` orders them, each with whether it can begin: its rate is known."""
    done, every = results(folder), plan(size)
    wanted = {run.name: run for one in only.split(",") for run in every if fnmatch(run.name, one)}
    for run in wanted.values():
        if run.name in done:
            continue
        rate = run.rate or chosen_rate(run.model, size, done, missing)
        yield (run if rate is None else replace(run, rate=rate)), rate is not None


def work(
    library: Library,
    size: Size,
    folder: Path,
    device: str,
    workers: int,
    minutes: float,
    only: str = "*",
    missing: int = 0,
) -> Iterator[dict[str, Any]]:
    """Makes runs until all are finished or time is up; several processes may work in one folder.

    `only`: names with commas, * and ? for anything; the order counts. `missing`: rates of a model that may be untried
    when one is chosen.
    """
    until = time.time() + 60 * minutes
    while time.time() < until:
        waiting = [one for one in ready(size, folder, only, missing) if library.offers(one[0].tasks)]
        if not waiting:
            return
        begun = False
        for run, able in waiting:
            if not able or _seconds_left(folder, run) > until - time.time() or not _claim(folder, run.name):
                continue
            begun = True
            try:
                result = train(run, library, folder, device, workers, until)
            finally:
                _lock(folder, run.name).unlink(missing_ok=True)
            if result is None:
                return
            yield result
            break
        if not begun:
            if all(able for _, able in waiting):
                return  # others make what is left, or it would not end in time
            time.sleep(1.0)


def _seconds_left(folder: Path, run: Run) -> float:
    """What a run will take, by those of its model that this commit finished, the ones of its length if any. 0 where
    nothing is known: other code may be much slower or faster."""
    own = [
        one for one in results(folder).values()
        if (one["run"]["model"], one["run"]["tuning"], one["diverged"]) == (run.model, run.tuning, None)
        and one["conditions"]["commit"] == COMMIT
    ]  # fmt: skip
    alike = [one for one in own if one["run"]["steps"] == run.total] or own
    if not alike:
        return 0.0
    progress = folder / "checkpoints" / run.name / "progress.json"
    done = json.loads(progress.read_text())["step"] if progress.is_file() else 0
    a_step = statistics.mean(one["seconds"] / one["run"]["steps"] for one in alike)
    return HOPE * ((run.total - done) * a_step + statistics.mean(one.get("test_seconds", 0.0) for one in alike))


def _lock(folder: Path, name: str) -> Path:
    return folder / "claims" / name


def _claim(folder: Path, name: str) -> bool:
    """Whether this process is the one that makes a run; the claim of a process that is gone counts for nothing."""
    path = _lock(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not _alive(path):
        path.unlink(missing_ok=True)
    try:
        with path.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return not (folder / "runs" / f"{name}.json").is_file()


def _alive(path: Path) -> bool:
    try:
        os.kill(int(path.read_text() or "0"), 0)
    except (ProcessLookupError, FileNotFoundError, ValueError):
        return False
    except PermissionError:
        return True
    return True

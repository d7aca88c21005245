"""The numbers behind the page: means over tasks, effective lengths, scores by depth, scores by tag."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from mgam.evaluation.results import Row, Trial

WITHIN = 0.85  # share of the model's own short-context score that a length must reach to count as read
DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """One method at one length, over all tasks that all methods could be asked."""

    method: str
    length: int
    score: float | None  # percent, mean over tasks; None where nothing could be read
    stderr: float | None
    entries: float | None
    seconds: float | None
    memory: float | None
    fits: bool


@dataclass(frozen=True)
class Reach:
    """How far a method reads."""

    method: str
    task: str  # "" for the mean over tasks
    short: float  # the reference: what the dense model scores at the shortest length, percent
    length: int | None  # longest length up to which every length is within; None if not even the shortest is
    likely: int | None = None  # the same, where a shortfall of at most one standard error counts as within


@dataclass(frozen=True)
class Cell:
    """One square of a heat map."""

    length: int
    depth: int  # number of the depth bin, 0 at the start of the document
    score: float | None
    trials: int


def methods_of(rows: Sequence[Row]) -> list[str]:
    """Methods in order, dense first."""
    found = list(dict.fromkeys(row.method for row in rows))
    return sorted(found, key=lambda method: method != DENSE)


def points(rows: Sequence[Row]) -> list[Point]:
    """Means over the percent tasks, for each method and length."""
    scored = [row for row in rows if row.unit == "percent"]
    return [
        _point(method, length, [row for row in scored if (row.method, row.length) == (method, length)])
        for method in methods_of(rows)
        for length in lengths_of(scored)
        if any((row.method, row.length) == (method, length) for row in scored)
    ]


def lengths_of(rows: Iterable[Row]) -> list[int]:
    return sorted({row.length for row in rows})


def _point(method: str, length: int, rows: list[Row]) -> Point:
    fits = all(row.status == "ok" and row.score is not None for row in rows)
    scores = [row.score for row in rows if row.score is not None] if fits else []
    errors = [row.stderr for row in rows if row.stderr is not None]
    return Point(
        method=method,
        length=length,
        score=_mean(scores),
        # tasks are fixed, samples are drawn: the error of the mean comes from the samples of each task
        stderr=sum(error**2 for error in errors) ** 0.5 / len(rows) if fits and len(errors) == len(rows) else None,
        entries=_mean(row.entries_per_query for row in rows),
        seconds=_mean(row.seconds for row in rows),
        memory=max((row.peak_memory_bytes for row in rows if row.peak_memory_bytes), default=None),
        fits=fits,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def reach(rows: Sequence[Row], task: str = "") -> list[Reach]:
    """Effective length of each method, over all percent tasks or for one."""
    chosen = [row for row in rows if row.unit == "percent" and task in ("", row.task)]
    found = points(chosen)
    first = next((point for point in found if point.method == DENSE and point.score is not None), None)
    if first is None or not first.score:
        return []
    near = []
    for method in methods_of(chosen):
        own = [point for point in found if point.method == method]
        near.append(Reach(method, task, first.score, _longest(own, first, 0.0), _longest(own, first, 1.0)))
    return near


def _longest(found: Sequence[Point], first: Point, errors: float) -> int | None:
    """The longest length without a break; `errors`: standard errors by which a score may fall short."""
    longest = None
    for point in sorted(found, key=lambda one: one.length):
        if point.score is None or first.score is None:
            break
        spread = ((point.stderr or 0.0) ** 2 + (WITHIN * (first.stderr or 0.0)) ** 2) ** 0.5
        if point.score + errors * spread < WITHIN * first.score:
            break
        longest = point.length
    return longest


def heat(trials: Iterable[Trial], method: str, tasks: Sequence[str], bins: int) -> list[Cell]:
    """Mean scores by length and by the depth of the evidence; a trial with several spans counts at each of them."""
    gathered: dict[tuple[int, int], list[float]] = {}
    for trial in trials:
        if trial.method != method or trial.task not in tasks or trial.unit != "percent":
            continue
        for depth in trial.depths:
            place = (trial.length, min(bins - 1, int(depth * bins)))
            gathered.setdefault(place, [])
            if trial.score is not None:
                gathered[place].append(100 * trial.score)
    return [Cell(length, depth, _mean(scores), len(scores)) for (length, depth), scores in sorted(gathered.items())]


def heat_tasks(trials: Iterable[Trial]) -> list[str]:
    """Tasks whose evidence stands at a place: those that ask for the whole text have no depth."""
    return list(
        dict.fromkeys(trial.task for trial in trials if trial.unit == "percent" and trial.depths and any(trial.depths))
    )


def by_quadrant(rows: Sequence[Row]) -> list[tuple[str, str, float, int]]:
    """(quadrant, method, mean score, tasks) over all lengths, where every method could read."""
    found = []
    for quadrant in sorted({row.quadrant for row in rows if row.unit == "percent"}):
        for method in methods_of(rows):
            chosen = [
                row
                for row in rows
                if row.quadrant == quadrant and row.method == method and row.unit == "percent" and row.score is not None
            ]
            mean = _mean(row.score for row in chosen)
            if mean is not None:
                found.append((quadrant, method, mean, len({row.task for row in chosen})))
    return found

"""Results: one line for each trial as it ends, and the table of means that is made from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, get_args

from mgam.errors import SettingError

Status = Literal["ok", "does not fit", "no sample"]
"""`no sample`: the task cannot be made at this length, for example because no text is long enough."""
Key = tuple[str, str, str, int, int, int]
Z_95 = 1.959963984540054
BEGINNINGS = (b'{"run": ', b'{"task": ')
"""How lines begin; a first one that was cut off is known by it."""


@dataclass(frozen=True)
class Trial:
    """One sample read by one method."""

    task: str
    method: str
    model: str
    length: int
    seed: int
    trial: int
    status: Status = "ok"
    score: float | None = None  # 0 to 1, or nats for tasks that measure loss
    parts: Mapping[str, float] = field(default_factory=dict)  # other figures of the same reply
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    entries_per_query: float | None = None
    tokens: int = 0  # of the document
    depths: Sequence[float] = ()
    diffusion: float = 0.0
    scope: float = 0.0
    quadrant: str = ""
    hits: bool = False
    unit: str = "percent"
    reply: str = ""
    gold: Sequence[str] = ()
    reason: str = ""  # why it was not read
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method
    preprocess_seconds: float | None = None  # of the seconds, until the document was read
    sample: str = ""  # fingerprint of what was read; "" where nothing was

    @property
    def key(self) -> Key:
        return (self.task, self.method, self.model, self.length, self.seed, self.trial)


@dataclass(frozen=True)
class Row:
    """The mean over the trials of one task, method, model and length."""

    task: str
    method: str
    model: str
    length: int
    trials: int
    score: float | None  # percent, or nats per token; None where it does not fit
    stderr: float | None  # of the mean; None with fewer than two trials
    low: float | None  # 95 % interval: Wilson's for hits, else the normal one
    high: float | None
    seconds: float | None
    peak_memory_bytes: int | None  # the largest of all trials
    entries_per_query: float | None
    status: Status
    unit: str
    reason: str
    tokens: float
    diffusion: float
    scope: float
    quadrant: str
    parts: Mapping[str, float]
    settings: Mapping[str, Any]
    preprocess_seconds: float | None = None  # of the seconds, until the document was read

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def wilson(hits: float, trials: int) -> tuple[float, float]:
    """95 % interval of a share of hits (Wilson 1927), as shares; sensible at 0 and at all of them."""
    share, z2 = hits / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(trials: Iterable[Trial]) -> list[Row]:
    """One row for each task, method, model and length, in order of first appearance."""
    sorted_trials: dict[tuple[str, str, str, int], list[Trial]] = {}
    for trial in trials:
        sorted_trials.setdefault((trial.task, trial.method, trial.model, trial.length), []).append(trial)
    return [_row(members) for members in sorted_trials.values()]


def _row(trials: list[Trial]) -> Row:
    first = trials[0]
    read = [trial for trial in trials if trial.status == "ok" and trial.score is not None]
    scale = 100.0 if first.unit == "percent" else 1.0
    scores = [scale * trial.score for trial in read if trial.score is not None]
    mean = fmean(scores) if scores else None
    error = stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    low, high = _interval(scores, mean, error, first)
    missing = next((trial for trial in trials if trial.status != "ok"), None)
    return Row(
        task=first.task,
        method=first.method,
        model=first.model,
        length=first.length,
        trials=len(read),
        score=mean,
        stderr=error,
        low=low,
        high=high,
        seconds=_mean(trial.seconds for trial in read),
        peak_memory_bytes=max((trial.peak_memory_bytes for trial in read if trial.peak_memory_bytes), default=None),
        entries_per_query=_mean(trial.entries_per_query for trial in read),
        status="ok" if missing is None else missing.status,
        unit=first.unit,
        reason="" if missing is None else missing.reason,
        tokens=_mean(trial.tokens for trial in trials) or 0.0,
        diffusion=_mean(trial.diffusion for trial in trials) or 0.0,
        scope=_mean(trial.scope for trial in trials) or 0.0,
        quadrant=max((trial.quadrant for trial in trials), key=[trial.quadrant for trial in trials].count),
        parts={
            name: fmean([trial.parts[name] for trial in read if name in trial.parts])
            for name in dict.fromkeys(name for trial in read for name in trial.parts)
        },
        settings=dict(first.settings),
        preprocess_seconds=_mean(trial.preprocess_seconds for trial in read),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def _interval(
    scores: list[float], mean: float | None, error: float | None, first: Trial
) -> tuple[float | None, float | None]:
    if mean is None:
        return None, None
    if first.hits:
        low, high = wilson(sum(scores) / 100, len(scores))
        return 100 * low, 100 * high
    if error is None:
        return None, None
    top = 100.0 if first.unit == "percent" else math.inf
    return max(0.0, mean - Z_95 * error), min(top, mean + Z_95 * error)


class ResultsFile:
    """A JSON-lines file of trials that a killed run leaves whole but for its last line.

    Opening it changes nothing; a last line that was cut off is dropped when the first one is appended.

    Raises:
        SettingError: a folder, or a file of something else.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None] = lambda message: None, write_to: Path | None = None
    ) -> None:
        self.path = path
        self.write_to = write_to or path  # another file where several processes share a run
        self.say = say
        self.trials: dict[Key, Trial] = {}
        self.runs: list[dict[str, Any]] = []
        self._whole_end = False
        if path.is_dir():
            raise SettingError(f"{path} is a folder and no results file; name a file with --results")
        if path.is_file():
            self._load()

    def _load(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        damaged = [number for number, line in enumerate(lines, start=1) if line.strip() and not self._takes(line)]
        begun = len(lines) == 1 and lines[0].startswith(BEGINNINGS)
        if damaged and not (self.trials or self.runs or begun):
            raise SettingError(
                f"{self.path} is not a results file: line {damaged[0]} is no JSON of a trial; "
                "name another file with --results"
            )
        if damaged:
            listed = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            which = f"line {listed} is" if len(damaged) == 1 else f"lines {listed} are"
            self.say(f"{self.path}: {which} damaged and left out; trials that no other line holds run again")

    def _takes(self, line: bytes) -> bool:
        try:
            self._take(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        return True

    def _take(self, record: Any) -> None:
        if not isinstance(record, dict):
            raise TypeError("not a trial")
        if "run" in record:
            self.runs.append(dict(record["run"]))
            return
        known = {one.name for one in fields(Trial)}
        trial = Trial(**{name: value for name, value in record.items() if name in known})
        if record["status"] not in get_args(Status):
            raise ValueError("not a trial")
        self.trials[trial.key] = trial

    def begin(self, run: Mapping[str, Any]) -> None:
        """Notes under which conditions the lines that follow were made."""
        self.runs.append(dict(run))
        self._append({"run": run})

    def add(self, trial: Trial) -> None:
        """Appends a trial; it is on disk when this returns."""
        self.trials[trial.key] = trial
        self._append(asdict(trial))

    def take_in(self, other: ResultsFile) -> None:
        """Appends all that another file holds."""
        for run in other.runs:
            self.begin(run)
        for trial in other.trials.values():
            self.add(trial)

    def _append(self, record: Mapping[str, Any]) -> None:
        self.write_to.parent.mkdir(parents=True, exist_ok=True)
        if not self._whole_end:
            _end_with_a_line(self.write_to)
            self._whole_end = True
        with self.write_to.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()


def _end_with_a_line(path: Path) -> None:
    """Drops a last line that was cut off, and ends one that only lacks its end."""
    raw = path.read_bytes() if path.is_file() else b""
    whole = raw.rfind(b"\n") + 1
    if whole == len(raw):
        return
    try:
        json.loads(raw[whole:])
    except (ValueError, RecursionError):
        os.truncate(path, whole)
    else:
        with path.open("ab") as file:
            file.write(b"\n")

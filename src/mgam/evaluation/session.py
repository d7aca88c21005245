"""One whole evaluation: a model, its methods, the tasks, and results that survive a kill."""

from __future__ import annotations

import glob
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mgam import processes
from mgam.errors import SettingError
from mgam.evaluation.cache import SampleCache
from mgam.evaluation.machine import conditions
from mgam.evaluation.paths import results_folder
from mgam.evaluation.reader import Reader
from mgam.evaluation.registry import Task, find_tasks, parse_lengths, unknown
from mgam.evaluation.results import ResultsFile, Row, Trial, summarise
from mgam.evaluation.runner import Bench, Plan, rows, run
from mgam.evaluation.texts import TextLibrary
from mgam.evaluation.tokens import TokenCounter
from mgam.words import counted

DENSE = "dense"


@dataclass(frozen=True)
class Session:
    """What a person asked to be measured."""

    tasks: Sequence[str]
    lengths: str
    methods: Sequence[str]
    model: str | None = None
    trials: int = 10
    seed: int = 0
    budget: int | None = None
    device: str = "auto"
    dtype: str | None = None
    download: bool = False
    results: Path | None = None
    keep_out: tuple[int, int] = (0, 0)
    prose: str | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class Outcome:
    """The rows of a session, its trials, and the conditions that they were made under."""

    rows: list[Row]
    trials: list[Trial]
    conditions: dict[str, Any]
    command: str = ""
    tasks: Sequence[Task] = field(default=())


def evaluate_session(session: Session, notes: Console) -> Outcome | None:
    """Runs what is missing and gathers the rows; None in processes other than the first of several."""
    started = time.perf_counter()
    tasks, labels = find_tasks(session.tasks), _methods(session.methods, session.budget)
    world, rank = processes.world(), processes.rank()
    plan = Plan(
        tasks,
        parse_lengths(session.lengths),
        session.trials,
        session.seed,
        session.keep_out,
        session.batch_size,
        rank,
        world,
    )
    texts = TextLibrary(prose=session.prose)
    _require_texts(tasks, texts)
    if session.results is not None:
        ResultsFile(session.results)  # a file of something else is refused before a model is loaded

    loaded, name = _load(session, notes)
    from mgam.evaluation.adapters import ModelReader

    changes = {} if session.budget is None else {"budget": session.budget}
    readers = [ModelReader(*loaded, label, name=name, settings=changes) for label in labels]
    for reader in readers:  # what cannot work with this model is said before anything is read
        _ = reader.settings
        reader.close()
    path = session.results or _own_results(session, name)
    say = _sayer(notes, rank)
    device = str(loaded[0].device)
    crew = _Crew(path, loaded[0].device.type)
    crew.begin(say)
    results = ResultsFile(path, say, crew.own)
    if session.results is None and results.trials and rank == 0:
        say(f"going on from {path}, which holds {counted(len(results.trials), 'trial')}")
    found = conditions(device)
    results.begin({**found, "model": name, "seed": session.seed, "command": _command(session)})
    there = len(results.trials)
    bench = Bench(TokenCounter(loaded[1]), texts, SampleCache(say=say), results, say=say)
    _run_all(plan, readers, bench, notes if rank == 0 else None)
    crew.end(say)
    if rank != 0:
        return None
    results = ResultsFile(path)
    table = rows(plan, [(reader.method, reader.model) for reader in readers], results)
    if session.results is None:
        path.unlink(missing_ok=True)  # finished: the next run of these settings starts afresh
    took = f"{time.perf_counter() - started:.0f} s, loading included, on {world} process{'es' if world > 1 else ''}"
    took += f"; {counted(there, 'trial')} of before" if there else ""
    return Outcome(
        table, list(results.trials.values()), {**found, "model": name, "took": took}, _command(session), tasks
    )


def export_session(session: Session, folder: Path, notes: Console) -> list[str]:
    """Writes the samples of a session as tasks of lm-evaluation-harness; returns their names.

    Raises:
        SettingError: as `evaluate_session` does, and for tasks that the harness cannot score.
    """
    from mgam.evaluation.harness import write_tasks

    tasks, texts = find_tasks(session.tasks), TextLibrary(prose=session.prose)
    _require_texts(tasks, texts)
    tokenizer = _load(session, notes)[0][1]
    lengths = parse_lengths(session.lengths)
    return write_tasks(folder, tasks, lengths, session.trials, session.seed, TokenCounter(tokenizer), texts)


def gather(files: Sequence[Path], notes: Console) -> Outcome:
    """All trials of some results files as one outcome: parts of a run that were made apart, or one that was cut.

    Raises:
        SettingError: a file is not there or of something else, or none holds a trial.
    """
    say = _sayer(notes, 0)
    trials: dict[Any, Trial] = {}
    runs: list[dict[str, Any]] = []
    for path in files:
        if not path.is_file():
            raise SettingError(f"there is no results file {path}; give files that mgam eval --results wrote")
        part = ResultsFile(path, say)
        trials |= part.trials
        runs += part.runs
    if not trials:
        raise SettingError(f"{', '.join(map(str, files))}: no trial is in there; mgam eval --results writes such files")
    first = runs[0] if runs else {}
    commands = dict.fromkeys(str(run.get("command", "")) for run in runs)
    known = {key: value for key, value in first.items() if key not in ("command", "seed")}
    for key in ("device", "commit"):
        known[key] = ", ".join(dict.fromkeys(str(run[key]) for run in runs if run.get(key)))
    return Outcome(summarise(trials.values()), list(trials.values()), known, "; ".join(filter(None, commands)))


def _run_all(plan: Plan, readers: Sequence[Any], bench: Bench, notes: Console | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=notes, disable=notes is None) as progress:
        for reader in readers:
            bar = progress.add_task(
                reader.method,
                total=len(range(plan.rank, plan.trials, plan.world)) * len(plan.tasks) * len(plan.lengths),
            )

            def advance(trial: Trial, bar: Any = bar, reader: Reader = reader) -> None:
                progress.update(bar, advance=1, description=f"{reader.method} {trial.task} {trial.length:,}")

            run(plan, reader, Bench(bench.counter, bench.texts, bench.samples, bench.results, advance, bench.say))
            reader.close()
            progress.update(bar, description=reader.method)


def _methods(given: Sequence[str], budget: int | None) -> list[str]:
    """Labels with dense first; names and settings that cannot work are refused before anything is read."""
    from mgam import methods
    from mgam.evaluation.adapters import parse_method

    known = methods.names()
    labels = [DENSE]
    for label in given:
        name, changes = parse_method(label)
        if name not in known and name != DENSE:
            raise SettingError(unknown("method", name, list(dict.fromkeys([DENSE, *known]))))
        if name != DENSE:
            methods.get(name).checked(**{**({} if budget is None else {"budget": budget}), **changes})
        if label not in labels:
            labels.append(label)
    return labels


def _require_texts(tasks: Sequence[Task], texts: TextLibrary) -> None:
    _ = texts.prose_source
    missing = sorted({task.needs for task in tasks if task.needs and not texts.has(task.needs)})
    if missing:
        names = ", ".join(task.name for task in tasks if task.needs in missing)
        raise SettingError(
            f"{names} need{'s' if ',' not in names else ''} text that is not on this machine; run "
            f"`mgam data fetch {' '.join(missing)}`, or choose tasks that run offline, as --tasks synthetic"
        )


def _load(session: Session, notes: Console) -> tuple[tuple[Any, Any], str]:
    from mgam.integrations.loading import DEFAULT_MODEL, load

    device = processes.own_device(session.device)
    loaded = load(session.model, device=device, dtype=session.dtype, download=session.download, on_status=notes.print)
    name = Path(session.model).name if session.model and Path(session.model).exists() else session.model
    return (loaded.model, loaded.tokenizer), name or DEFAULT_MODEL


def _own_results(session: Session, name: str) -> Path:
    """Where a run without `--results` keeps its trials until it is done: by its settings and by the code."""
    package = Path(str(resources.files("mgam")))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()
    what = repr((name, session.tasks, session.lengths, session.methods, session.seed, session.budget, session.keep_out))
    what += repr((session.trials, session.device, session.dtype, session.prose, code))
    return results_folder() / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.jsonl"


def _sayer(notes: Console, rank: int) -> Callable[[str], None]:
    def say(message: str) -> None:
        notes.print(f"[yellow]note[/] {'' if rank == 0 else f'(process {rank}) '}{message}", highlight=False)

    return say


class _Crew:
    """Several processes that share one run, each with a file of its own that the first one gathers."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.first = path, processes.rank() == 0
        self.crew = processes.crew(device)
        self.own = path if self.crew is None else path.with_name(f"{path.name}.{processes.rank()}")

    def begin(self, say: Callable[[str], None]) -> None:
        if self.first:
            self._gather(say)
        self._wait()

    def end(self, say: Callable[[str], None]) -> None:
        self._wait()
        if self.first:
            self._gather(say)

    def _gather(self, say: Callable[[str], None]) -> None:
        for part in sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.[0-9]*")):
            if part.suffix[1:].isdecimal():
                ResultsFile(self.path).take_in(ResultsFile(part, say))
                part.unlink()

    def _wait(self) -> None:
        if self.crew is not None:
            self.crew.wait_for_everyone()


def _command(session: Session) -> str:
    words = ["mgam eval", f"--tasks {','.join(session.tasks)}", f"--lengths {session.lengths}"]
    words += [f"--methods {','.join(session.methods)}", f"--trials {session.trials}", f"--seed {session.seed}"]
    words += [f"--model {Path(session.model).name}"] if session.model else []
    words += [f"--budget {session.budget}"] if session.budget is not None else []
    words += [f"--batch-size {session.batch_size}"] if session.batch_size > 1 else []
    words += [f"--dtype {session.dtype}"] if session.dtype else []
    words += [f"--prose {session.prose}"] if session.prose else []
    words += [f"--keep-out {session.keep_out[0]},{session.keep_out[1]}"] if session.keep_out != (0, 0) else []
    return " ".join(words)

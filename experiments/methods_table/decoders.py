"""Methods that read with an unmodified decoder: quality, time, memory and entries read, within a given time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mgam.evaluation.adapters import ModelReader
from mgam.evaluation.cache import SampleCache
from mgam.evaluation.machine import conditions
from mgam.evaluation.registry import Task, find_tasks, parse_lengths
from mgam.evaluation.results import ResultsFile
from mgam.evaluation.runner import Bench, Plan, run
from mgam.evaluation.sample import Request
from mgam.evaluation.texts import TextLibrary
from mgam.evaluation.tokens import TokenCounter
from mgam.integrations.loading import DEFAULT_MODEL, load, locate

METHODS = (
    "dense,mgam:question_budget=1024,mgam:question_budget=4096,mgam:reread=2048,streaming-llm,quest,longheads,snapkv,"
    "h2o,moba,infini-retri,sliding,strided,dilated,blockwise,longformer,bigbird,dyadic"
)
TASKS = "needle_prose,needle_keys,variables,facts_by_id,loss_novels"
AT_ONCE = {8192: 5, 32768: 5, 131072: 2}
"""Trials of a round and task, by length; questions of all tasks are read as one batch. One beyond, five below."""
LOSSES = {8192: 2, 32768: 2}
"""Trials of a round of tasks that measure loss; one elsewhere."""


def measure(options: argparse.Namespace) -> None:
    """Lets `workers` processes of this device do what is wanted, until it is done or the minutes are over.

    Each takes the next round that none has taken, so that none waits for another. What is under way when the minutes
    are over is stopped; trials that were read are kept, and the next call goes on.
    """
    until = time.monotonic() + 60 * options.minutes
    locate(options.model)  # a GGUF file is unpacked once, before the processes start
    path = _results(options)
    _gather(path)
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "worker", "--out", str(options.out)]
    command += ["--methods", options.methods, "--tasks", options.tasks, "--lengths", options.lengths]
    command += ["--trials", str(options.trials), "--device", options.device, "--seed", str(options.seed)]
    command += ["--workers", str(options.workers)] + ([] if options.model is None else ["--model", options.model])
    with tempfile.TemporaryDirectory() as claims:
        alive = [
            subprocess.Popen([*command, "--claims", claims, "--number", str(number)])
            for number in range(options.workers)
        ]
        for one in alive:
            try:
                one.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                print("the minutes are over; what is under way is stopped", flush=True)
                break
        for one in alive:
            one.terminate()
            one.wait()
    _gather(path)


def work(options: argparse.Namespace) -> None:
    """One process: takes rounds that no other has taken, and reads all tasks of each."""
    model, tokenizer = load(options.model, device=options.device)
    path = _results(options)
    results = ResultsFile(path, print, path.with_name(f"{path.name}.{options.number}"))
    found = {**conditions(str(model.device)), "model": _name(options), "seed": options.seed}
    command = f"experiments/methods_table/run.py decoders --trials {options.trials}"
    results.begin({**found, "processes": options.workers, "command": command})
    bench = Bench(TokenCounter(tokenizer), TextLibrary(), SampleCache(say=print), results, say=print)
    tasks = find_tasks(options.tasks.split(","))
    for length, number, method in _rounds(options):
        if not _taken(options.claims, length, number, method):
            continue
        reader = ModelReader(model, tokenizer, method, name=_name(options))
        for plan in _plans(tasks, length, number, method, options, bench):
            names, begun = ",".join(task.name for task in plan.tasks), time.perf_counter()
            try:
                run(plan, reader, bench)
            except Exception as error:  # a kernel's too: the other cells go on, the reason stands in the table
                for task in plan.tasks:
                    _failed(options, method, task.name, length, error)
                if "CUDA error" in str(error):
                    raise  # this process reads nothing any more
            print(f"{_name(options)} {method} {names} {length} {time.perf_counter() - begun:.1f} s", flush=True)
        reader.close()


def _plans(
    tasks: Sequence[Task], length: int, number: int, method: str, options: argparse.Namespace, bench: Bench
) -> Iterator[Plan]:
    """What a round reads: the questions of all tasks at once, then each task of losses.

    A task whose trials are all there stands, whatever batch they were read in.
    """
    left = []
    for task in tasks:
        trials = number * _at_once(length, task)
        if not all(_there(task, length, index, method, options, bench) for index in range(trials)):
            left.append(task)
    asking = [task for task in left if task.score_losses is None]
    if asking:
        each = _at_once(length)
        yield Plan(asking, [length], number * each, options.seed, batch_size=each * len(asking))
    for task in left:
        if task.score_losses is not None:
            yield Plan([task], [length], number * _at_once(length, task), options.seed)


def _there(task: Task, length: int, index: int, method: str, options: argparse.Namespace, bench: Bench) -> bool:
    """Whether a trial was read before, from the sample that it would be read from now."""
    done = bench.results.trials.get((task.name, method, _name(options), length, options.seed, index))
    if done is None or done.status != "ok":
        return False
    request = Request(task.name, length, options.seed, index, bench.counter, bench.texts)
    return done.sample == bench.samples.get(task, request).fingerprint


def _rounds(options: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """Length, number of the round, method: the first round of all lengths, in their order, then the next."""
    for number in range(1, options.trials + 1):
        for length in parse_lengths(options.lengths):
            if number == 1 or number * _at_once(length) <= options.trials:
                for method in options.methods.split(","):
                    yield length, number, method


def _taken(claims: Path, *round_: Any) -> bool:
    """Whether this process is the first to ask for a round."""
    try:
        (claims / json.dumps(round_).replace("/", "|")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _at_once(length: int, task: Task | None = None) -> int:
    """Trials of a round."""
    if task is not None and task.score_losses is not None:
        return LOSSES.get(length, 1)
    return AT_ONCE.get(length, 1 if length > 131072 else 5)


def _name(options: argparse.Namespace) -> str:
    return Path(options.model).stem if options.model else DEFAULT_MODEL


def _results(options: argparse.Namespace) -> Path:
    path: Path = options.out / f"decoders.{_name(options)}.jsonl"
    return path


def _gather(path: Path) -> None:
    """Puts what the processes wrote, each into a file of its own, into one."""
    for part in sorted(path.parent.glob(f"{path.name}.[0-9]*")):
        ResultsFile(path, print).take_in(ResultsFile(part, print))
        part.unlink()


def _failed(options: argparse.Namespace, method: str, task: str, length: int, error: Exception) -> None:
    """Notes a cell that could not be read, and why."""
    keys = ("model", "method", "task", "length", "error")
    cell: Sequence[Any] = (_name(options), method, task, length, f"{type(error).__name__}: {error}")
    print(cell, flush=True)
    with (options.out / "failed.jsonl").open("a") as file:
        file.write(json.dumps(dict(zip(keys, cell, strict=True))) + "\n")

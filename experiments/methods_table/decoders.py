"""Methods that read with an unmodified decoder: quality, time, memory and entries read, within a given time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mgam.evaluation.adapters import ModelReader
from mgam.evaluation.cache import SampleCache
from mgam.evaluation.machine import conditions
from mgam.evaluation.registry import Task, find_tasks, parse_lengths
from mgam.evaluation.results import ResultsFile
from mgam.evaluation.runner import Bench, Plan, run
from mgam.evaluation.texts import TextLibrary
from mgam.evaluation.tokens import TokenCounter
from mgam.integrations.loading import DEFAULT_MODEL, load, locate

METHODS = (
    "dense,mgam:question_budget=1024,mgam:question_budget=4096,streaming-llm,quest,longheads,snapkv,h2o,moba,"
    "infini-retri,sliding,strided,dilated,blockwise,longformer,bigbird,dyadic"
)
TASKS = "needle_prose,needle_keys,variables,facts_by_id,loss_novels"
AT_ONCE = {8192: 5, 32768: 5, 131072: 2}
"""Trials of a round, read as one batch, by length; one trial beyond, twice as many below."""
LOSSES = {8192: 2, 32768: 2}
"""Trials of a round of tasks that measure loss; one elsewhere."""


def measure(options: argparse.Namespace) -> None:
    """Shares methods out to `workers` processes of this device and waits for them; what was done is gone on from."""
    locate(options.model)  # a GGUF file is unpacked once, before the processes start
    methods = options.methods.split(",")
    shares = [methods[number :: options.workers] for number in range(options.workers)]
    begun = time.time()
    alive = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run.py")), "worker", "--out", str(options.out)]
            + ["--number", str(number), "--methods", ",".join(share), "--tasks", options.tasks]
            + ["--lengths", options.lengths, "--trials", str(options.trials), "--device", options.device]
            + ["--seed", str(options.seed), "--until", str(begun + 60 * options.minutes)]
            + ["--workers", str(options.workers)]
            + ([] if options.model is None else ["--model", options.model])
        )
        for number, share in enumerate(shares)
        if share
    ]
    for one in alive:
        one.wait()


def work(options: argparse.Namespace) -> None:
    """One process: its methods, shortest lengths first, round by round until the time is over."""
    model, tokenizer = load(options.model, device=options.device)
    name = Path(options.model).stem if options.model else DEFAULT_MODEL
    results = ResultsFile(options.out / f"decoders.{name}.{options.number}.jsonl", print)
    found = {**conditions(str(model.device)), "model": name, "seed": options.seed, "processes": options.workers}
    results.begin({**found, "command": f"experiments/methods_table/run.py decoders --trials {options.trials}"})
    bench = Bench(TokenCounter(tokenizer), TextLibrary(), SampleCache(say=print), results, say=print)
    for path in sorted(options.out.glob(f"decoders.{name}.*.jsonl")):  # what other processes did before
        results.trials |= ResultsFile(path, print).trials
    took: dict[tuple[str, bool, int], list[float]] = {}
    for length, trials, method, task in _cells(options):
        left, kind = options.until - time.time(), task.score_losses is not None
        guess = _guess(took, method, kind, length)
        if left < 0 or guess > left:
            _skipped(options, name, method, task.name, length, trials, guess, left)
            continue
        begun = time.perf_counter()
        reader = ModelReader(model, tokenizer, method, name=name)
        batch = 1 if task.score_losses else _at_once(length)
        try:
            run(Plan([task], [length], trials, options.seed, batch_size=batch), reader, bench)
        except Exception as error:  # the other cells go on; the reason is kept
            _skipped(options, name, method, task.name, length, trials, guess, left, f"{type(error).__name__}: {error}")
        finally:
            reader.close()
        seconds = time.perf_counter() - begun
        took.setdefault((method, kind, length), []).append(seconds)
        print(f"{os.getpid()} {name} {method} {task.name} {length} {seconds:.1f} s, {left:.0f} s left", flush=True)


def _cells(options: argparse.Namespace) -> Iterator[tuple[int, int, str, Task]]:
    """Length, trials up to here, method, task: a round of all lengths, then the next."""
    tasks, lengths = find_tasks(options.tasks.split(",")), parse_lengths(options.lengths)
    for number in range(1, options.trials + 1):
        for length in sorted(lengths):
            for method in options.methods.split(","):
                for task in tasks:
                    each = LOSSES.get(length, 1) if task.score_losses else _at_once(length)
                    if number * each <= max(options.trials, each):
                        yield length, number * each, method, task


def _at_once(length: int) -> int:
    return AT_ONCE.get(length, 1 if length > 131072 else 5)


def _guess(took: dict[tuple[str, bool, int], list[float]], method: str, kind: bool, length: int) -> float:
    """Seconds that a cell may take, from the fastest of the method's cells at the next shorter length.

    The first cell of a method compiles its kernels, so it says little about the others.
    """
    shorter = [other for name, one, other in took if (name, one) == (method, kind) and other < length]
    if not shorter:
        return 0.0
    near = max(shorter)
    return min(took[method, kind, near]) * (length / near) ** 1.3


def _skipped(options: argparse.Namespace, *cell: Any) -> None:
    """Notes what was not measured, and why."""
    keys = ("model", "method", "task", "length", "trials", "seconds_guessed", "seconds_left", "error")
    with (options.out / f"skipped.{options.number}.jsonl").open("a") as file:
        file.write(json.dumps(dict(zip(keys, cell, strict=False))) + "\n")

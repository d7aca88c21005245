"""Methods that must be trained: small models from scratch on recall, copying and a needle; full attention beside."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

import torch

from mgam.evaluation.machine import conditions
from mgam.evaluation.patterns.tasks import IGNORED, Batch, make_batch
from mgam.evaluation.patterns.train import SIZES, Training, able, train

VOCABULARY = 32
SHORT = 64
"""Texts of so many tokens and fewer are read with half the sizes."""
HALVES: dict[str, dict[str, Any]] = {
    "mgam": {"levels": (1, 4, 16), "window": 8, "budget": 16, "block": 4},
    "sliding": {"window": 16},
    "strided": {"window": 16},
    "dilated": {"window": 8},
    "blockwise": {"window": 16, "exchange": 4},
    "longformer": {"window": 16, "global_tokens": 2},
    "bigbird": {"block": 4},
    "reformer": {"bucket": 8},
    "nsa": {"blocks": 4, "window": 8},
    "moba": {"block": 4},
    "cca": {"window": 8},
    "dga": {"block": 4, "look": 4},
}
"""Settings that keep the share of a text that is read token by token what it is at 128 tokens."""


def recall(rows: int, length: int, seed: int, device: str) -> Batch:
    """Pairs of key and value, then the keys again in another order: the value is to follow each."""
    return make_batch("causal-self", rows, length, seed, keys=16, device=device)


def copying(rows: int, length: int, seed: int, device: str) -> Batch:
    """A random text, then the same again."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(0, VOCABULARY, (rows, length // 2), generator=draw)
    text = torch.cat((first, first), 1)
    answer = torch.full_like(text, IGNORED)
    answer[:, length // 2 : -1] = text[:, length // 2 + 1 :]
    return Batch("causal-self", VOCABULARY, text.to(device), answer.to(device))


def needle(rows: int, length: int, seed: int, device: str) -> Batch:
    """One token of another kind anywhere in noise; after each of the questions at the end it is to follow."""
    draw = torch.Generator().manual_seed(seed)
    end, kinds = length - length // 8, VOCABULARY // 2
    text = torch.randint(0, kinds, (rows, length), generator=draw)
    told = torch.randint(kinds, VOCABULARY - 1, (rows, 1), generator=draw)
    text.scatter_(1, torch.randint(0, end, (rows, 1), generator=draw), told)
    text[:, end:] = VOCABULARY - 1
    answer = torch.full_like(text, IGNORED)
    answer[:, end:] = told
    return Batch("causal-self", VOCABULARY, text.to(device), answer.to(device))


TASKS = {"copying": copying, "needle": needle, "recall": recall}
SHARE = {"copying": 0.3, "needle": 0.3, "recall": 1.0}
"""Steps of each task as a share of what is given: full attention learns the first two several times sooner."""


def one(task: str, method: str, how: dict[str, Any]) -> dict[str, Any]:
    """Trains one model; called in a process of its own."""
    torch.set_num_threads(1)
    short = how["length"] <= SHORT
    training = Training(**how, sizes=HALVES.get(method, {}) if short else {})

    def batch(rows: int, seed: int) -> Batch:
        return TASKS[task](rows, training.length, seed, training.device)

    begun = time.process_time()
    found = asdict(train(task, "causal-self", method, batch, training))
    core = round(time.process_time() - begun, 2)
    more = {"sizes": dict(training.sizes), "steps_at_most": training.steps, "core_seconds": core}
    return {"task": task, **how, **more, **found}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per task, method and seed; what is in the file already is not trained again."""
    path = options.out / "trained.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["task"], line["method"], line["length"], line["seed"]) for line in lines}
    named = options.methods.split(",") if options.methods else able("causal-self")
    how = {"width": options.width, "device": options.device, "rows": options.rows}
    jobs = [
        (task, method, {**how, "steps": round(SHARE[task] * options.steps), "length": length, "seed": seed})
        for seed in range(options.seed, options.seed + options.seeds)
        for length in map(int, options.lengths.split(","))
        for task in TASKS
        for method in named
        if method in SIZES and (task, method, length, seed) not in done
    ]
    found = conditions(options.device)
    context = multiprocessing.get_context("spawn")
    with path.open("a") as file, ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        waiting = [pool.submit(one, *job) for job in jobs]
        for ready in as_completed(waiting):
            line = {
                **ready.result(),
                "processes": options.workers,
                "machine": found["device"],
                "commit": found["commit"],
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
            yield line

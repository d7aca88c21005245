"""Time and memory, and the figures of a part: as trained, and read otherwise."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mgam.nn import LearnedGranularAttention
from mgam.nn.base import Seen
from papertable.library import Library
from papertable.sample import Sample
from papertable.score import SILENCE, choices, first_hop_alone, oracle, rouges, score
from papertable.shelf import Part
from papertable.watch import watched

SEED = 0
"""Of test and dev samples: the same for all."""
EACH = ("accuracy", "f1")
"""Figures that are kept of every sample, for differences of two models on the same ones."""
CUTS: dict[str, dict[str, Any]] = {
    "everything as tokens": {},
    "policy of chance": {"policy": "random"},
    "what is nearest": {"policy": "fixed"},
    "window and first chunk alone": {"rest": "drop", "budget": 0},
}
"""Ways to read with weights that were trained to read otherwise."""


class Clock:
    """Times of several steps, without waiting for the device in between; on a CPU the processor's time."""

    def __init__(self, device: str) -> None:
        self.gpu = device.startswith("cuda")
        self.events: list[tuple[Any, Any]] = []
        self.found: list[float] = []
        self.began = 0.0

    def __enter__(self) -> None:
        if self.gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self.events.append(pair)
            pair[0].record()
        self.began = time.process_time()

    def __exit__(self, *failure: object) -> None:
        if self.gpu:
            self.events[-1][1].record()
        else:
            self.found.append((time.process_time() - self.began) * 1e3)

    def milliseconds(self) -> list[float]:
        """Of each step so far."""
        if not self.gpu:
            return self.found
        if self.events:
            torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in self.events]


def reset_memory(device: str) -> None:
    """Peak memory counts from here, where the device can say so."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int:
    """Bytes: of tensors on a GPU; of the whole process, since it began, on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def evaluate(
    model: nn.Module,
    library: Library,
    tasks: Sequence[str],
    part: Part,
    cells: Sequence[tuple[int, int]],
    tokens: int,
    device: str,
    workers: int = 0,
) -> dict[str, Any]:
    """Figures of every task and length, in percent: {task: {length: {figure: value}}}; entries read, {length: ...}."""
    model.eval()
    made = Batches(library, tasks, part, cells, tokens)
    scores: dict[str, dict[int, dict[str, list[float]]]] = {
        task: {length: defaultdict(list) for length, _ in cells} for task in tasks
    }
    counted: dict[int, list[dict[str, float]]] = {length: [] for length, _ in cells}
    for (length, task, _), samples in zip(made.every, ready(made, workers), strict=True):
        with torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext():
            units, spans, entries = watched(model, samples, device)
        counted[length].append(entries)
        for sample, choice in zip(samples, choices(units, spans, samples), strict=True):
            for name, value in score(library, sample, choice).items():
                scores[task][length][name].append(100 * value)
    return {
        "scores": {task: {str(length): _means(one) for length, one in own.items()} for task, own in scores.items()},
        "entries": {str(length): _means(_together(parts)) for length, parts in counted.items()},
        "samples": {
            task: {str(length): {name: [round(value) for value in one[name]] for name in EACH if name in one}
                   for length, one in own.items()} for task, own in scores.items()
        },
    }  # fmt: skip


def _together(parts: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """All values by name, of those parts that have one."""
    found: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name, value in part.items():
            found[name].append(value)
    return found


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.mean(all_), 4) for name, all_ in values.items()}


class Batches(Dataset[list[Sample]]):
    """Samples that are read together, of every length and task: of as many tokens as a step of training has."""

    def __init__(
        self, library: Library, tasks: Sequence[str], part: Part, cells: Sequence[tuple[int, int]], tokens: int
    ) -> None:
        self.library, self.part = library, part
        self.every = [
            (length, task, range(low, min(count, low + max(1, tokens // length))))
            for length, count in cells for task in tasks for low in range(0, count, max(1, tokens // length))
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.every)

    def __getitem__(self, index: int) -> list[Sample]:
        length, task, numbers = self.every[index]
        return [self.library.sample(task, self.part, length, SEED, number) for number in numbers]


def ready(made: Dataset[Any], workers: int, pinned: bool = False) -> DataLoader[Any]:
    """Batches in their order, made by other processes where there are some."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    more: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    return DataLoader(made, batch_size=None, num_workers=workers, pin_memory=pinned, **more)


@contextmanager
def read_otherwise(model: nn.Module, policy: str = "", **chooser: Any) -> Iterator[None]:
    """MGAM's layers choose by another policy or under other settings of their chooser; with neither they read every
    token as such: full attention with the weights that they learned."""
    layers: list[Any] = [layer.attention for layer in model.layers]  # type: ignore[union-attr]
    kept = [(layer.chooser, layer.policy, layer.scores, layer.kernels) for layer in layers]
    for layer in layers:
        layer.chooser = replace(layer.chooser, **chooser)
        if policy:
            layer.policy, layer.scores = policy, None
        elif not chooser:
            layer.kernels, layer.attend = False, partial(_all, layer)
    try:
        yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            layer.chooser, layer.policy, layer.scores, layer.kernels = own
            layer.__dict__.pop("attend", None)


def _all(layer: LearnedGranularAttention, seen: Seen) -> torch.Tensor:
    return F.scaled_dot_product_attention(seen.q, seen.k, seen.v, is_causal=layer.causal, scale=layer.scale)


def baselines(library: Library, tasks: Sequence[str], part: Part, cells: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Chance, silence and the oracle on the same samples; of two hops, who makes the first alone."""
    found: dict[str, Any] = {}
    for task in tasks:
        for length, count in cells:
            scores: dict[str, list[float]] = defaultdict(list)
            for at in range(count):
                sample = library.sample(task, part, length, SEED, at)
                scores["chance accuracy"].append(100 * min(1.0, len(sample.gold) / len(sample.ends)))
                for name, choice in (("oracle", oracle(sample)), ("silence", SILENCE)):
                    for figure, value in score(library, sample, choice).items():
                        scores[f"{name} {figure}"].append(100 * value)
                if task == "hop" and library.data == "packages":
                    for figure, value in first_hop_alone(library, sample).items():
                        scores[f"first hop {figure}"].append(100 * value)
                if sample.lead:
                    drawn = np.random.default_rng(at).choice(len(sample.ends), 3, replace=False).tolist()
                    for figure, value in rouges(library, sample, drawn).items():
                        scores[f"chance {figure}"].append(100 * value)
            found.setdefault(task, {})[str(length)] = {name: statistics.mean(all_) for name, all_ in scores.items()}
    return found

"""Time, memory, entries read, and the figures of a part."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mgam.nn import FullAttention, LearnedGranularAttention, LongformerAttention
from papertable.library import Library
from papertable.sample import Sample, collate
from papertable.score import SILENCE, choices, oracle, rouges, score
from papertable.shelf import Part

SEED = 0
"""Of test and dev samples: the same for all."""
EVERYTHING = 1 << 30
"""A budget that opens all."""


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
            units, spans, entries = _watched(model, samples, device)
        counted[length].append(entries)
        for sample, choice in zip(samples, choices(units, spans, samples), strict=True):
            for name, value in score(library, sample, choice).items():
                scores[task][length][name].append(100 * value)
    return {
        "scores": {task: {str(length): _means(one) for length, one in own.items()} for task, own in scores.items()},
        "entries": {str(length): _means(_together(parts)) for length, parts in counted.items()},
    }


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
def wide_open(model: nn.Module) -> Iterator[None]:
    """MGAM reads every token as such: full attention with the weights that it learned."""
    layers: list[Any] = [layer.attention for layer in model.layers]  # type: ignore[union-attr]
    choosers = [layer.chooser for layer in layers]
    for layer in layers:
        layer.chooser = replace(layer.chooser, budget=EVERYTHING, share=None)
    try:
        yield
    finally:
        for layer, chooser in zip(layers, choosers, strict=True):
            layer.chooser = chooser


def baselines(library: Library, tasks: Sequence[str], part: Part, cells: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Chance, silence and the oracle on the same samples."""
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
                if sample.lead:
                    drawn = np.random.default_rng(at).choice(len(sample.ends), 3, replace=False).tolist()
                    for figure, value in rouges(library, sample, drawn).items():
                        scores[f"chance {figure}"].append(100 * value)
            found.setdefault(task, {})[str(length)] = {name: statistics.mean(all_) for name, all_ in scores.items()}
    return found


def _watched(
    model: nn.Module, samples: Sequence[Sample], device: str
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Logits, and entries that a query reads on average over queries, heads and layers, by level."""
    layers = [layer.attention for layer in model.layers]  # type: ignore[union-attr]
    granular = [layer for layer in layers if isinstance(layer, LearnedGranularAttention)]
    for layer in granular:
        layer.seen_covers = []
    units, spans = model(collate(samples).to(device))
    each = _granular_entries(granular, samples) if granular else [_entries(layer, samples) for layer in layers]
    for layer in granular:
        layer.seen_covers = None
    return units, spans, {name: statistics.mean(one[name] for one in each) for name in each[0]}


def _entries(layer: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    tokens = len(samples[0].tokens)
    place = np.arange(tokens)
    if isinstance(layer, FullAttention):
        return {"tokens": float((place + 1).mean()) if layer.causal else float(tokens)}
    if isinstance(layer, LongformerAttention):
        low, high = np.maximum(place - layer.window + 1, 0), np.minimum(place + layer.window, tokens)
        own = high - low + np.clip(low, 0, layer.global_tokens)
        own[: layer.global_tokens] = tokens
        return {"tokens": float(own.mean())}
    raise TypeError(f"{type(layer).__name__} does not say what it reads")


def _granular_entries(layers: Sequence[LearnedGranularAttention], samples: Sequence[Sample]) -> list[dict[str, float]]:
    """Of each layer by its covers. What is counted on a device comes back at once: others wait for it too."""
    tokens = len(samples[0].tokens)
    counted, last = [], []
    for layer in layers:
        chunk, covers = layer.levels.chunk, layer.seen_covers or []
        numbers = torch.zeros(layer.levels.top + 1, dtype=torch.float64, device=covers[0][1].opened.device)
        for part, cover in covers:
            near = (part.right.clamp_max(tokens) - part.left + chunk * (part.left >= chunk)).double()
            numbers[0] += (near - ((layer.block - 1) / 2 if layer.causal else 0)).sum()
            numbers[0] += (cover.opened >= 0).sum(-1).double().mean((0, 1)).sum() * chunk
            for level, read in enumerate(cover.read, start=1):
                numbers[level] += read.sum(-1).double().mean((0, 1)).sum()
        counted.append(numbers)
        last.append(covers[-1][1].opened[:, :, -1])
    whole = torch.cat([torch.stack(counted).flatten(), torch.stack(last).double().flatten()]).cpu()
    counts, opened = whole.split([sum(map(len, counted)), sum(one.numel() for one in last)])
    found = []
    apart = (counts.view(len(layers), -1), opened.view(len(layers), *last[0].shape))
    for layer, own, ends in zip(layers, *apart, strict=True):
        blocks = -(-tokens // layer.block)
        window = max(0, (blocks - 1) * layer.block - layer.side)
        held = _held(ends, window, samples, layer.levels.chunk)
        entries = [value / blocks for value in own.tolist()]
        found.append({"tokens": entries[0], **{f"level {at}": value for at, value in enumerate(entries[1:], start=1)}})
        if held:
            found[-1]["gold read as tokens"] = statistics.mean(held)
    return found


def _held(opened: torch.Tensor, window: int, samples: Sequence[Sample], chunk: int) -> list[float]:
    """Share of heads that read the end of a gold unit as tokens for <answer>, of units before its window."""
    found = []
    for row, sample in enumerate(samples):
        for number in sample.gold.tolist():
            end = int(sample.ends[number])
            if chunk <= end < window:
                found.append(float((opened[row] == end // chunk).any(-1).double().mean()))
    return found

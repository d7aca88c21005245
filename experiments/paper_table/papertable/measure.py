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
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mgam.nn import FullAttention, LearnedGranularAttention, LongformerAttention
from mgam.nn.base import Seen
from papertable.library import Library
from papertable.sample import Sample, collate
from papertable.score import SILENCE, choices, first_hop_alone, oracle, rouges, score
from papertable.shelf import Part

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
            units, spans, entries = _watched(model, samples, device)
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


def _watched(
    model: nn.Module, samples: Sequence[Sample], device: str
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Logits, and entries that a query reads on average over queries, heads and layers, by level."""
    layers = [layer.attention for layer in model.layers]  # type: ignore[union-attr]
    granular = [layer for layer in layers if isinstance(layer, LearnedGranularAttention)]
    for layer in granular:
        layer.seen_covers = []
    units, spans = model(collate(samples).to(device))
    each = [_entries(layer, samples) for layer in layers if layer not in granular]
    if granular and granular[0].seen_covers:
        each = _granular_entries(granular, samples)
    for layer in granular:
        layer.seen_covers = None
    names = each[0] if each else ()  # none where MGAM reads as full attention does
    return units, spans, {name: statistics.mean(one[name] for one in each if name in one) for name in names}


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
    counted = []
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
    reads = _reads(layers, samples)
    counts = torch.stack(counted).cpu().tolist()
    found = []
    for layer, own in zip(layers, counts, strict=True):
        blocks = -(-tokens // layer.block)
        entries = [value / blocks for value in own]
        found.append({"tokens": entries[0], **{f"level {at}": value for at, value in enumerate(entries[1:], start=1)}})
    found[0] |= reads
    return found


def _reads(layers: Sequence[LearnedGranularAttention], samples: Sequence[Sample]) -> dict[str, float]:
    """How far some blocks read evidence as tokens that is outside their windows, on average over such pairs: the share
    of heads, whether any head of any layer does, and the share of chunks that they opened, which chance would find.

    `answer`: the block of <answer> reads the ends of gold units; `question`: the first block does, whose tokens all
    others read; `between`: the blocks of gold units read one another, or those of a planted question.
    """
    layer, tokens = layers[0], len(samples[0].tokens)
    chunk = layer.levels.chunk
    pairs: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for row, sample in enumerate(samples):
        gold = sample.ends[sample.gold].tolist()
        asked = [sample.planted[1]] if sample.planted[0] >= 0 else gold
        ways = [("answer", tokens - 1, one) for one in gold] + [("question", 0, one) for one in gold]
        ways += [("between", one, other) for a in gold for b in asked for one, other in ((a, b), (b, a)) if a != b]
        for name, reader, read in dict.fromkeys(ways):
            start = reader // layer.block * layer.block
            after = start + layer.block + (0 if layer.causal else layer.side)
            if chunk <= read < start - layer.side or (not layer.causal and after <= read):
                pairs[name].append((row, start // layer.block, read // chunk))
    names = [name for name, own in pairs.items() for _ in own]
    if not names:
        return {}
    opened = [torch.cat([cover.opened for _, cover in one.seen_covers or []], 2) for one in layers]
    row, block, wanted = torch.tensor([pair for own in pairs.values() for pair in own], device=opened[0].device).T
    here = torch.stack([one[row, :, block] for one in opened])  # layers, pairs, heads, opened
    read = (here == wanted[:, None, None]).any(-1)
    start = block * layer.block
    free = (start - layer.side).clamp_min(chunk) // chunk - 1
    if not layer.causal:
        free = free + (tokens - start - layer.block - layer.side).clamp_min(0) // chunk
    spent = (here >= 0).sum(-1).double().mean((0, 2)) / free.clamp_min(1)
    figures = torch.stack([read.double().mean((0, 2)), read.any(0).any(-1).double(), spent]).cpu().numpy()
    by_name = np.array(names)
    return {
        f"{name} reads evidence, {figure}": float(values[by_name == name].mean())
        for name in pairs
        for figure, values in zip(("heads", "any head", "chance"), figures, strict=True)
    }

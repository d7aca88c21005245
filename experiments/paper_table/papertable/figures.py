"""Means and intervals over seeds, and what the paper claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from papertable.plan import SEEDS, pooled

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
"""97.5 % quantiles of Student's t, by degrees of freedom."""
CLAIMED = {"bert": (72.5, 70.3), "gpt2": (74.8, 73.1), "longformer": (76.2, 74.5), "mgam": (80.1, 78.6)}
"""Accuracy and F1 in the paper, for models of these names; of the conditions nothing is published."""
CLAIMED_MARGINS = (3.9, 4.1)
"""MGAM over Longformer: accuracy and F1."""


@dataclass(frozen=True)
class Figure:
    """Mean over seeds, half of a 95 % interval (None of one seed alone), and how many seeds."""

    mean: float
    half: float | None
    seeds: int

    def __str__(self) -> str:
        spread = "" if self.half is None else f" ± {self.half:.1f}"
        return f"{self.mean:.1f}{spread}"


def figure(values: Sequence[float]) -> Figure | None:
    """Mean and 95 % t-interval."""
    if not values:
        return None
    half = None
    if len(values) > 1:
        half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Figure(statistics.mean(values), half, len(values))


def scores(results: dict[str, dict[str, Any]], model: str, name: str, length: str | None = None) -> list[float]:
    """A pooled figure of each finished seed; a run that diverged counts as 0."""
    found = []
    for seed in range(SEEDS):
        result = results.get(f"{model}-{seed}")
        if result is None:
            continue
        value = 0.0 if result["diverged"] is not None else pooled(result["test"]["scores"], name, length)
        if value is not None:
            found.append(value)
    return found


def margin(results: dict[str, dict[str, Any]], left: str, right: str, name: str) -> Figure | None:
    """Difference of two models over the seeds that both have finished."""
    both = [seed for seed in range(SEEDS) if all(f"{one}-{seed}" in results for one in (left, right))]
    ours, theirs = (
        scores({f"{one}-{seed}": results[f"{one}-{seed}"] for seed in both}, one, name) for one in (left, right)
    )
    return figure([a - b for a, b in zip(ours, theirs, strict=True)])


def apart(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]], name: str) -> Figure | None:
    """Difference of the tests of two kinds of runs, seed by seed on the same samples, with a normal 95 % interval over
    samples; None where no seed has samples of both.

    Each sample counts with its mean over runs, each cell of task and length with equal weight. The interval is of these
    trainings: others may differ by more.
    """
    both = [pair for pair in zip(left, right, strict=True) if all("samples" in one for one in pair)]
    if not both:
        return None
    sides = [[pair[side]["samples"] for pair in both] for side in (0, 1)]
    means, errors = [], []
    for task, lengths in sides[0][0].items():
        for length, cell in lengths.items():
            if name not in cell:
                continue
            each = [
                [
                    statistics.mean(of_sample)
                    for of_sample in zip(*(one[task][length][name] for one in side), strict=True)
                ]
                for side in sides
            ]
            gaps = [a - b for a, b in zip(*each, strict=True)]
            means.append(statistics.mean(gaps))
            errors.append(statistics.variance(gaps) / len(gaps) if len(gaps) > 1 else 0.0)
    if not means:
        return None
    return Figure(statistics.mean(means), 1.96 * math.sqrt(sum(errors)) / len(errors), len(both))


def grown(points: Sequence[dict[str, Any]], model: str, length: int, name: str) -> float | None:
    """What `growth` measured of a model at a length."""
    return next((line.get(name) for line in points if (line["model"], line["length"]) == (model, length)), None)

"""Pictures: growth of time and memory, F1 by length, losses."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from mgam.benchmarks.plots import pyplot
from papertable.compared import by_length
from papertable.figures import scores
from papertable.models import FAR, MODELS

Lines = dict[str, list[tuple[float, float]]]


def draw(folder: Path, found: dict[str, dict[str, Any]], points: list[dict[str, Any]]) -> list[Path]:
    """One SVG for each kind of figure that is there.

    Raises:
        SettingError: when matplotlib is not installed.
    """
    pictures: list[tuple[str, Lines, str, str, bool]] = []
    growing = (("time", "step_ms", "training step, ms", 1.0),
               ("memory", "step_peak_bytes", "peak memory of a training step, GB", 1e9))  # fmt: skip
    for name, field, unit, scale in growing:
        lines: Lines = defaultdict(list)
        for line in points:
            if field in line:
                lines[line["model"]].append((line["length"], line[field] / scale))
        pictures.append((name, lines, "tokens", unit, True))
    everywhere: Lines = {}
    lengths = sorted({int(one) for result in found.values() if "test" in result and not result["run"]["tuning"]
                      for one in result["test"]["entries"]})  # fmt: skip
    for model in MODELS:
        values = [(length, scores(found, model, "f1", str(length))) for length in lengths]
        everywhere[model] = [(length, sum(each) / len(each)) for length, each in values if each]
    pictures.append(("f1", everywhere, "tokens of a document", "F1, mean over tasks and seeds", False))
    far: Lines = {name: [*by_length(found, f"far-{name}")] for name in FAR}
    pictures.append(("far", far, "tokens of a document", "evidence found, %: question far from it", False))
    losses: Lines = {}
    for model in MODELS:
        result = found.get(f"{model}-0")
        if result:
            every = result["run"]["steps"] / max(1, len(result["losses"]))
            losses[model] = [(every * (at + 1), loss) for at, loss in enumerate(result["losses"])]
    pictures.append(("loss", losses, "steps", "training loss of seed 0", False))
    return [
        _picture(folder / f"{name}.svg", lines, across, up, logs)
        for name, lines, across, up, logs in pictures if any(lines.values())
    ]  # fmt: skip


def _picture(path: Path, lines: Lines, across: str, up: str, logs: bool) -> Path:
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(7, 4.5))
    for label, points in lines.items():
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o" if len(points) < 20 else "", label=label)
    if logs:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plots.close(figure)
    return path

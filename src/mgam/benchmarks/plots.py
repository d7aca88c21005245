"""Pictures of a run: time and memory against length, on log axes."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from mgam.benchmarks.suite import Report
from mgam.errors import SettingError


def pyplot() -> Any:
    """matplotlib's interface to draw with, without a window; SVGs come out alike each time and keep their text.

    Raises:
        SettingError: when matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib import pyplot as plots
    except ImportError as missing:
        raise SettingError("pictures need matplotlib: pip install 'mgam[plots]'") from missing
    plots.switch_backend("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "mgam", "svg.fonttype": "none"}
    return plots


def plot(report: Report, folder: Path) -> list[Path]:
    """One picture of time for each phase and batch, and one of memory.

    Raises:
        SettingError: when matplotlib is not installed.
    """
    plots = pyplot()
    groups: dict[tuple[str, int], dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    memory: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in report.rows:
        if row.tokens and not math.isnan(row.ms):
            groups[row.phase, row.batch][f"{row.part}: {row.kernel}"].append((row.tokens, row.ms))
            if row.memory_gb:
                memory[f"{row.phase}, {row.part}"].append((row.tokens, row.memory_gb))
    written = []
    pictures = [(f"{phase}-batch-{batch}", lines, "milliseconds") for (phase, batch), lines in groups.items()]
    if memory:
        pictures.append(("memory", memory, "GB beyond queries, keys and values"))
    for name, lines, unit in pictures:
        figure, axes = plots.subplots(figsize=(9, 6))
        for label, points in sorted(lines.items()):
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.set_title(f"{report.machine.device}, {report.setting.dtype}, commit {report.machine.commit}", fontsize=9)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
        path = folder / f"{report.name}-{name.replace(' ', '-').replace('+', 'and')}.png"
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plots.close(figure)
        written.append(path)
    return written

"""The rows of a run as a table in the terminal: methods side by side, dense first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mgam.evaluation.results import Row


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Scores with standard errors, then what reading cost."""
    methods = list(dict.fromkeys(row.method for row in rows))
    cells = {(row.task, row.length, row.method): row for row in rows}
    table = Table(title="score in percent ± standard error (nats per token where a task measures loss)")
    table.add_column("task", no_wrap=True)
    table.add_column("length", justify="right")
    for method in methods:
        table.add_column(method, justify="right")
    for task in dict.fromkeys(row.task for row in rows):
        for length in sorted({row.length for row in rows if row.task == task}):
            shown = [_score(cells.get((task, length, method))) for method in methods]
            table.add_row(task, f"{length:,}", *shown)
    console.print(table)
    console.print(_cost(rows, methods))


def _score(row: Row | None) -> str:
    if row is None:
        return ""
    if row.score is None:
        return row.status
    digits = 1 if row.unit == "percent" else 3
    error = "" if row.stderr is None else f" ± {row.stderr:.{digits}f}"
    return f"{row.score:.{digits}f}{error}" + ("" if row.status == "ok" else f" ({row.trials} read)")


def _cost(rows: Sequence[Row], methods: Sequence[str]) -> Table:
    table = Table(title="what reading cost (mean over tasks; memory is the highest)")
    table.add_column("length", justify="right")
    table.add_column("method")
    for name in ("seconds", "of them reading", "peak memory, GiB", "entries per query"):
        table.add_column(name, justify="right")
    for length in sorted({row.length for row in rows}):
        for method in methods:
            found = [row for row in rows if (row.length, row.method) == (length, method) and row.score is not None]
            if not found:
                continue
            seconds = [row.seconds for row in found if row.seconds is not None]
            reading = [row.preprocess_seconds for row in found if row.preprocess_seconds is not None]
            memory = [row.peak_memory_bytes for row in found if row.peak_memory_bytes]
            entries = [row.entries_per_query for row in found if row.entries_per_query]
            table.add_row(
                f"{length:,}",
                method,
                f"{sum(seconds) / len(seconds):.2f}" if seconds else "",
                f"{sum(reading) / len(reading):.2f}" if reading else "",
                f"{max(memory) / 2**30:.2f}" if memory else "",
                f"{sum(entries) / len(entries):,.0f}" if entries else "",
            )
    return table

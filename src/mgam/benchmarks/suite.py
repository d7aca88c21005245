"""Runs the figures one after the other, and writes them as they come: a run that is cut off keeps what it has."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

from mgam.benchmarks.decode import decode_rows
from mgam.benchmarks.dense import DENSE_AT_MOST, dense_rows
from mgam.benchmarks.machine import Machine, here
from mgam.benchmarks.peers import flex_row, moba_row, nsa_row, quest_row, same_blocks_row
from mgam.benchmarks.prefill import prefill_rows, window_row
from mgam.benchmarks.setting import Row, Setting, both, guarded
from mgam.benchmarks.training import training_rows


@dataclass
class Report:
    """Rows of one run with their conditions."""

    machine: Machine
    setting: Setting
    rows: list[Row] = field(default_factory=list)
    name: str = "attention"
    """Of the files that are written."""

    def write(self, folder: Path) -> None:
        """CSV and JSON of what there is so far."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [one.name for one in fields(Row)]
        with (folder / f"{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(row.as_dict() for row in self.rows)
        setting = {one.name: str(getattr(self.setting, one.name)) for one in fields(Setting)}
        whole = {"machine": self.machine.as_dict(), "setting": setting, "rows": [row.as_dict() for row in self.rows]}
        (folder / f"{self.name}.json").write_text(json.dumps(whole, indent=1))


def run(
    setting: Setting,
    lengths: Sequence[int],
    phases: Sequence[str],
    folder: Path | None = None,
    commit: str | None = None,
    name: str = "attention",
    say: Callable[[str], None] = print,
) -> Report:
    """Measures the phases at each length."""
    report = Report(here(commit), setting, name=name)
    say(str(report.machine))
    for row in _rows(setting, report.machine, lengths, phases):
        report.rows.append(row)
        say(line(row))
        if folder is not None:
            report.write(folder)
    return report


def line(row: Row) -> str:
    """One figure in one line."""
    rate = f" {row.tflops:6.0f} TFLOP/s ({row.matmul_share:.0%} of a product)" if row.tflops else ""
    moved = f" {row.gbs:6.0f} GB/s ({row.copy_share:.0%} of a copy)" if row.gbs else ""
    spread = f"[{row.fastest:.3f} {row.slowest:.3f}] x{row.repeats}"
    what = f"{row.part}, {row.kernel}{rate}{moved} {row.note}"
    return f"{row.phase:19} {row.tokens:>8} b{row.batch:<3} {row.ms:9.3f} ms {spread:26} {what}"


def _rows(setting: Setting, machine: Machine, lengths: Sequence[int], phases: Sequence[str]) -> Iterator[Row]:
    for tokens in lengths:
        if "prefill" in phases:
            yield from guarded("prefill", partial(prefill_rows, setting, machine, tokens))
            yield from guarded("prefill", partial(dense_rows, setting, machine, tokens))
        if "peers" in phases:
            for make in (window_row, same_blocks_row, flex_row, nsa_row, moba_row):
                yield from guarded("prefill", partial(_alone, make, setting, machine, tokens))
        if "training" in phases and tokens <= DENSE_AT_MOST:
            for placed in both(setting):
                yield from guarded("training", partial(training_rows, placed, machine, tokens))
            yield from guarded("training", partial(dense_rows, setting, machine, tokens, True))
        for batch in (1, 16) if "decode" in phases else ():
            if tokens * batch > 1 << 22:
                continue
            yield from guarded("decode", partial(decode_rows, setting, machine, tokens, batch))
            if "peers" in phases:
                yield from guarded("decode", partial(_alone, quest_row, setting, machine, tokens, batch))


def _alone(make: Callable[..., Row], *settings: object) -> Iterator[Row]:
    yield make(*settings)

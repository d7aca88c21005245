"""One page, with no network, that says at first sight where each method breaks; JSON and CSV beside it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields
from pathlib import Path

from mgam.evaluation.paths import replace_file
from mgam.evaluation.report.page import render
from mgam.evaluation.results import Row
from mgam.evaluation.session import Outcome

__all__ = ["write_report"]

CSV_FIELDS = tuple(one.name for one in fields(Row) if one.name not in ("parts", "settings"))


def write_report(path: Path, outcome: Outcome) -> list[Path]:
    """Writes `path` (HTML) and files of the same name ending in .json and .csv; returns all three."""
    page, data, table = path.with_suffix(".html"), path.with_suffix(".json"), path.with_suffix(".csv")
    replace_file(page, render(outcome))
    whole = {
        "conditions": outcome.conditions,
        "command": outcome.command,
        "rows": [row.to_json() for row in outcome.rows],
    }
    replace_file(data, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.to_json() for row in outcome.rows)
    replace_file(table, text.getvalue())
    return [page, data, table]

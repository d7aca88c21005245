"""The leaderboard: one table over the reports that are kept in the repository."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgam.errors import DocumentError
from mgam.evaluation.report.charts import short_number
from mgam.evaluation.report.figures import WITHIN, Reach, lengths_of, methods_of, points, reach
from mgam.evaluation.results import Row
from mgam.words import counted

HEAD = """# Leaderboard

Made by `mgam leaderboard` from the reports in `{folder}/`; each report's own command stands below the table. A score is
the mean over the report's tasks in percent, ± standard error; dense attention of the same run stands first. The
effective length is the longest up to which a method stays within {within} of the dense model's score at the shortest
length; in brackets, the longest up to which it does so within one standard error.
"""


def leaderboard(folder: Path) -> str:
    """Markdown of all reports (`*.json` beside `*.html`) in `folder`, newest first.

    Raises:
        DocumentError: there is none, or one of them is damaged.
    """
    reports = [(path, _read(path)) for path in sorted(folder.glob("*.json"))]
    if not reports:
        raise DocumentError(f"{folder} holds no reports; make one with mgam eval --report {folder}/NAME.html")
    reports.sort(key=lambda one: str(one[1]["conditions"].get("date", "")), reverse=True)
    parts = [HEAD.format(folder=folder.name or folder.resolve().name, within=f"{WITHIN:.0%}".replace("%", " %"))]
    parts += [_report(path, whole) for path, whole in reports]
    return "\n".join(parts)


def _read(path: Path) -> dict[str, Any]:
    try:
        whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole["rows"] = [Row(**row) for row in whole["rows"]]
        return {"conditions": {}, "command": "", **whole}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DocumentError(f"{path} is no report of mgam eval, or damaged ({error}); make it again") from error


def _report(path: Path, whole: dict[str, Any]) -> str:
    rows: Sequence[Row] = whole["rows"]
    found = whole["conditions"]
    scored = [row for row in rows if row.unit == "percent"]
    lengths = lengths_of(scored)
    cells = {(point.method, point.length): point for point in points(scored)}
    far = {one.method: one for one in reach(scored)}
    tasks = list(dict.fromkeys(row.task for row in scored))
    trials = counted(max(row.trials for row in rows), "trial")
    lines = [
        f"## {found.get('model', path.stem)}, {found.get('device', '')}",
        "",
        f"{found.get('date', '')}, commit {found.get('commit', 'unknown')}; {trials} "
        f"of {', '.join(tasks)}. [Report]({path.with_suffix('.html').name})",
        "",
        f"| method | {' | '.join(map(short_number, lengths))} | effective length |",
        f"|---|{'---|' * (len(lengths) + 1)}",
    ]
    for method in methods_of(scored):
        shown = [_cell(cells.get((method, length))) for length in lengths]
        lines.append(f"| {method} | {' | '.join(shown)} | {_effective(far.get(method))} |")
    if whole["command"]:
        lines += ["", f"`{whole['command']}`"]
    return "\n".join([*lines, ""])


def _effective(one: Reach | None) -> str:
    if one is None:
        return "not reached"
    length = short_number(one.length) if one.length else "not reached"
    return length if one.likely in (None, one.length) else f"{length} ({short_number(one.likely or 0)})"


def _cell(point: Any) -> str:
    if point is None or point.score is None:
        return "does not fit"
    return f"{point.score:.1f}" + (f" ± {point.stderr:.1f}" if point.stderr is not None else "")

"""The sections below the first sight: every task, costs, losses, tags, conditions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mgam.evaluation.registry import all_tasks
from mgam.evaluation.report.charts import INK, WHITE_FROM, Dot, Series, colours, heat_colour, line_chart, short_number
from mgam.evaluation.report.figures import DENSE, Point, by_quadrant, lengths_of, methods_of, points, reach
from mgam.evaluation.report.html import legend, section, table
from mgam.evaluation.results import Row
from mgam.evaluation.session import Outcome
from mgam.words import counted


def every_task(rows: Sequence[Row]) -> str:
    methods = methods_of(rows)
    lengths = lengths_of(rows)
    cells = {(row.task, row.method, row.length): row for row in rows}
    known = all_tasks()
    body = []
    for task in dict.fromkeys(row.task for row in rows if row.unit == "percent"):
        far = {one.method: one.length for one in reach(rows, task)}
        for number, method in enumerate(methods):
            what = known[task].summary if task in known else ""
            name = (
                f'<td class="left" rowspan="{len(methods)}" title="{escape(what)}">{escape(task)}</td>'
                if not number
                else ""
            )
            shown = "".join(_score_cell(cells.get((task, method, length))) for length in lengths)
            reached = short_number(far[method] or 0) if far.get(method) else "–"
            body.append(f'<tr>{name}<td class="left">{escape(method)}</td>{shown}<td>{reached}</td></tr>')
    return section(
        "Every task",
        "Percent ± standard error. Rest the pointer on a figure for its 95 % interval (Wilson's where a task is right "
        "or wrong), on a task for what it asks.",
        table(["task", "method", *map(short_number, lengths), "effective"], body),
    )


def _score_cell(row: Row | None) -> str:
    if row is None:
        return "<td></td>"
    if row.score is None:
        return f'<td class="faint" title="{escape(row.reason)}">{row.status}</td>'
    ink = "#fff" if row.score >= WHITE_FROM else INK
    error = f" <small>± {row.stderr:.1f}</small>" if row.stderr is not None else ""
    span = f"95 %: {row.low:.1f} to {row.high:.1f}" if row.low is not None and row.high is not None else ""
    beside = "; ".join(f"{name} {value:.2f}" for name, value in row.parts.items())
    title = escape(f"{counted(row.trials, 'trial')}; {span}; {beside}")
    return f'<td style="background:{heat_colour(row.score)};color:{ink}" title="{title}">{row.score:.1f}{error}</td>'


def costs(rows: Sequence[Row]) -> str:
    methods, found = methods_of(rows), points(rows)
    charts = []
    for title, value in (
        ("entries read per query", lambda point: point.entries),
        ("seconds per question", lambda point: point.seconds),
        ("peak memory, GiB", lambda point: point.memory and point.memory / 2**30),
    ):
        series = []
        for method in methods:
            dots = [
                Dot(
                    value(point),
                    point.score,
                    point.stderr,
                    _cost_label(point, title, value(point)),
                    short_number(point.length),
                )
                for point in found
                if point.method == method and point.score is not None and value(point)
            ]
            series.append(Series(method, colours(methods)[method], dots))
        charts.append(
            f'<div class="card"><h3>{title}</h3>{line_chart(series, x_title=title, width=304, height=250)}</div>'
        )
    return section(
        "Quality against cost",
        "Each dot is a method at the length written on it: higher is better, further left is cheaper.",
        legend(methods),
        f'<div class="row">{"".join(charts)}</div>',
    )


def _cost_label(point: Point, title: str, value: float | None) -> str:
    return f"{point.method}, {point.length:,} tokens: {point.score:.1f} % at {value:,.3g} {title}"


def losses(rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if row.unit == "nats"]
    if not chosen:
        return ""
    body = []
    for row in sorted(chosen, key=lambda one: (one.task, one.length, one.method != DENSE)):
        score = row.status if row.score is None else f"{row.score:.4f}" + (f" ± {row.stderr:.4f}" if row.stderr else "")
        profile = ", ".join(f"{name} {value:.3f}" for name, value in row.parts.items())
        body.append(
            f'<tr><td class="left">{escape(row.task)}</td><td class="left">{escape(row.method)}</td>'
            f"<td>{short_number(row.length)}</td><td>{score}</td><td class='left'>{escape(profile)}</td></tr>"
        )
    return section(
        "Loss by position",
        "Nats per token, lower is better. No query looks ahead.",
        table(["task", "method", "length", "mean", "by position in the text"], body, words=(0, 1, 4)),
    )


def quadrants(rows: Sequence[Row]) -> str:
    found = by_quadrant(rows)
    body = [
        f'<tr><td class="left">{escape(quadrant)}</td><td class="left">{escape(method)}</td>'
        f"<td>{score:.1f}</td><td>{tasks}</td></tr>"
        for quadrant, method, score, tasks in found
    ]
    return section(
        "By how hard the evidence is to find, and how much of it there is",
        "Diffusion and scope after arXiv 2407.00402, on our own scale; mean score over the lengths that could be read.",
        table(["diffusion / scope", "method", "score", "tasks"], body),
    )


def conditions(outcome: Outcome) -> str:
    shown = {name: value for name, value in outcome.conditions.items() if name != "versions" and value is not None}
    versions = outcome.conditions.get("versions", {})
    shown["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    settings = {row.method: row.settings for row in outcome.rows}
    for method, values in settings.items():
        shown[f"settings of {method}"] = ", ".join(f"{name}={value}" for name, value in values.items())
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in shown.items())
    again = f"<p>Made again by <code>{escape(outcome.command)}</code></p>" if outcome.command else ""
    return section("Conditions", "", f"<dl>{entries}</dl>", again)

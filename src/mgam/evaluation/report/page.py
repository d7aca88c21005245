"""The page: what a stranger should see first stands first."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from mgam.evaluation.report.charts import Dot, Series, colours, heat_map, line_chart, short_number
from mgam.evaluation.report.figures import (
    DENSE,
    WITHIN,
    Point,
    Reach,
    heat,
    heat_tasks,
    lengths_of,
    methods_of,
    points,
    reach,
)
from mgam.evaluation.report.html import key, legend, section
from mgam.evaluation.report.sections import conditions, costs, every_task, losses, quadrants
from mgam.evaluation.results import Row, Trial
from mgam.evaluation.session import Outcome
from mgam.words import counted

SCRIPT = """
for (const box of document.querySelectorAll("select[data-shows]"))
  box.addEventListener("change", () => {
    for (const part of document.querySelectorAll(`[data-part="${box.dataset.shows}"]`))
      part.hidden = part.dataset.name !== box.value;
  });
"""


def render(outcome: Outcome) -> str:
    """The whole page as text."""
    wanted = {(row.task, row.method, row.length) for row in outcome.rows}
    trials = [trial for trial in outcome.trials if (trial.task, trial.method, trial.length) in wanted]
    style = resources.files("mgam.evaluation.report").joinpath("page.css").read_text(encoding="utf-8")
    sections = (
        _summary(outcome),
        _over_length(outcome.rows),
        _heat_maps(trials, outcome.rows),
        every_task(outcome.rows),
        costs(outcome.rows),
        losses(outcome.rows),
        quadrants(outcome.rows),
        conditions(outcome),
    )
    title = f"How far does {outcome.conditions.get('model', 'the model')} read?"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _summary(outcome: Outcome) -> str:
    rows, methods = outcome.rows, methods_of(outcome.rows)
    found = {one.method: one for one in reach(rows)}
    tasks = {row.task for row in rows if row.unit == "percent"}
    lengths = lengths_of(rows)
    trials = max((row.trials for row in rows), default=0)
    intro = (
        f'<p class="faint">{len(tasks)} task{"s" if len(tasks) != 1 else ""}, lengths '
        f"{', '.join(short_number(length) for length in lengths)} tokens, {counted(trials, 'trial')} each, "
        f"on {escape(str(outcome.conditions.get('device', '')))}, {escape(str(outcome.conditions.get('date', '')))}</p>"
    )
    if not found:
        return (
            intro
            + '<p class="none">The dense model finds nothing even at the shortest length: no effective length.</p>'
        )
    cards = [
        f'<div class="card reach"><h3>{key(method, methods)}</h3>'
        f"<b>{_reach_words(found[method].length)}</b>{_likely(found[method])}"
        f'<span class="faint">{_own_limit(method, found[method].length, rows)}</span></div>'
        for method in methods
        if method in found
    ]
    short = next(iter(found.values())).short
    note = (
        "<p>Effective length: the longest text up to which the mean over all tasks stays within "
        f"{WITHIN:.0%} of what the dense model scores at {short_number(lengths[0])} tokens ({short:.0f} %); where one "
        "standard error more would make it longer, that is said too.</p>"
    )
    lead = f'<p class="lead">{escape(_verdict(found, lengths[-1]))}</p>'
    return f'{intro}{lead}<div class="row">{"".join(cards)}</div>{note}'


def _verdict(found: dict[str, Reach], longest: int) -> str:
    """The result in one sentence."""
    dense = found[DENSE].length if DENSE in found else None
    others = {method: one.length for method, one in found.items() if method != DENSE and one.length is not None}
    if not others or dense is None:
        return ""
    best = max(others, key=lambda method: others[method])
    far, times = others[best], others[best] / dense
    least = "at least " if far == longest else ""
    if times > 1:
        return f"{best} reads {least}{short_number(far)} tokens: {times:.3g} times as far as dense attention."
    how = "as" if times == 1 else "not as"
    said = f"{best} reads {least}{short_number(far)} tokens, {how} far as dense attention."
    likely, beside = found[best].likely or far, found[DENSE].likely or dense
    if likely > far:
        said += f" Within one standard error: {short_number(likely)}, and {short_number(beside)} for dense attention."
    return said


def _likely(one: Reach) -> str:
    if one.likely in (None, one.length):
        return ""
    return f'<span class="faint">{short_number(one.likely or 0)} within one standard error</span><br>'


def _reach_words(length: int | None) -> str:
    return "not reached" if length is None else f"{short_number(length)} tokens"


def _own_limit(method: str, length: int | None, rows: Sequence[Row]) -> str:
    missing = [row.length for row in rows if row.method == method and row.status == "does not fit"]
    if missing:
        return f"does not fit from {short_number(min(missing))} on"
    longest = max(row.length for row in rows if row.method == method and row.unit == "percent")
    return "as far as was measured" if length == longest else f"measured to {short_number(longest)}"


def _over_length(rows: Sequence[Row]) -> str:
    methods = methods_of(rows)
    found = points(rows)
    paint = colours(methods)
    series = [
        Series(
            method,
            paint[method],
            [_dot(point, point.length) for point in found if point.method == method and point.score is not None],
        )
        for method in methods
    ]
    window = next((row.settings.get("trained_window") for row in rows if row.settings.get("trained_window")), None)
    mark = (float(window), "trained window") if window else None
    chart = line_chart(series, x_title="tokens", ticks=lengths_of(rows), mark=mark, width=1040, height=320)
    card = f'<div class="card">{chart}</div>'
    return section("Score over length", "Mean over tasks; bars are standard errors.", legend(methods), card)


def _dot(point: Point, x: float) -> Dot:
    error = "" if point.stderr is None else f" ± {point.stderr:.1f}"
    label = f"{point.method}, {point.length:,} tokens: {point.score:.1f} %{error}"
    return Dot(x, point.score or 0.0, point.stderr, label)


def _heat_maps(trials: Sequence[Trial], rows: Sequence[Row]) -> str:
    tasks = heat_tasks(trials)
    if not tasks:
        return ""
    each = max(1, max(row.trials for row in rows))
    bins = 10 if each >= 40 else 5
    choices = [("all of these tasks", tasks), *((task, [task]) for task in tasks)]
    parts = []
    for number, (name, chosen) in enumerate(choices):
        maps = "".join(_heat_card(trials, rows, method, chosen, bins) for method in methods_of(rows))
        hidden = " hidden" if number else ""
        parts.append(f'<div class="row" data-part="heat" data-name="{escape(name)}"{hidden}>{maps}</div>')
    options = "".join(f"<option>{escape(name)}</option>" for name, _ in choices)
    return section(
        "Where in the text it is found",
        "Percent right, by length and by the depth at which the evidence stands (0 % is the start of the text). "
        "Grey: does not fit.",
        f'<p><select data-shows="heat" aria-label="task">{options}</select></p>',
        *parts,
    )


def _heat_card(trials: Sequence[Trial], rows: Sequence[Row], method: str, tasks: Sequence[str], bins: int) -> str:
    lengths = lengths_of(row for row in rows if row.task in tasks)
    cells = {(cell.length, cell.depth): cell for cell in heat(trials, method, tasks, bins)}
    fits = {
        length: any(
            row.score is not None for row in rows if (row.method, row.length) == (method, length) and row.task in tasks
        )
        for length in lengths
    }

    def score(length: int, depth: int) -> tuple[float | None, int, bool]:
        cell = cells.get((length, depth))
        return (cell.score, cell.trials, fits[length]) if cell else (None, 0, fits[length])

    name = key(method, methods_of(rows))
    return f'<div class="card"><h3>{name}</h3>{heat_map(lengths, bins, score)}</div>'

"""Markdown tables and plots of what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from decoders import METHODS, TASKS
from growth import exponent

from mgam import methods
from mgam.benchmarks.plots import pyplot
from mgam.evaluation.results import ResultsFile, Row, summarise

Place = tuple[str, int, str, str]
"""Model, length, method and task of a row."""


def write(folder: Path) -> None:
    """Writes `decoders.md`, `trained.md`, `growth.md` and their plots into the folder, from what is there."""
    parts = {"decoders": _decoders, "trained": _trained, "growth": _growth}
    for name, make in parts.items():
        text = make(folder)
        if text:
            (folder / f"{name}.md").write_text(text, encoding="utf-8")
            print(text)


def _decoders(folder: Path) -> str:
    files = [ResultsFile(path, print) for path in sorted(folder.glob("decoders.*.jsonl*"))]
    trials = {key: trial for file in files for key, trial in file.trials.items()}
    rows, runs, commits_of = _with_earlier(
        folder / "decoders.json", summarise(trials.values()), [run for file in files for run in file.runs]
    )
    if not rows:
        return ""
    device, processes = (_told(runs, name) for name in ("device", "processes"))
    days = sorted(str(run["date"])[:10] for run in runs if "date" in run)
    dates = " to ".join(dict.fromkeys((*days[:1], *days[-1:])))
    failed = _failures(folder)
    lines = [
        "# Methods that read with an unmodified decoder",
        "",
        f"{dates}, {device}; {processes} processes shared "
        "a device with other work, so seconds compare within a table and are no speed figures. Scores in percent "
        "± standard error (trials); loss in nats per token. Entries, seconds and memory are means over the question "
        "tasks; memory is the highest peak of the process, in brackets how many texts it read at once. What does not "
        "fit did not fit beside the other processes. Rows of one commit are of one run, and all are of the same "
        f"samples. Commits of all runs: {_told(runs, 'commit')}.",
        "",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        for length in sorted({row.length for row in rows if row.model == model}):
            chosen = [row for row in rows if (row.model, row.length) == (model, length)]
            here = {(method, task): why for (*place, method, task), why in failed.items() if place == [model, length]}
            table = _table(chosen, here, commits_of)
            lines += [f"## {model}, {length:,} tokens", "", *table, "", _frontier(chosen), ""]
            lines += _reasons(chosen, here)
    _plot_quality(rows, folder / "decoders.svg")
    return "\n".join(lines)


def _told(runs: Sequence[dict[str, Any]], name: str) -> str:
    return ", ".join(dict.fromkeys(str(run[name]) for run in runs if name in run))


def _place(row: Row) -> Place:
    return row.model, row.length, row.method, row.task


def _with_earlier(
    path: Path, rows: Sequence[Row], runs: Sequence[dict[str, Any]]
) -> tuple[list[Row], list[dict[str, Any]], dict[Place, str]]:
    """The rows and runs, with those of an earlier table whose trials are elsewhere, and at which commit each row was
    made; keeps all for later tables."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": [], "rows": []}
    found: dict[Place, Row] = {}
    commits: dict[Place, str] = {}
    for one in kept["rows"]:
        made, row = one.pop("commit", "earlier"), Row(**one)
        found[_place(row)], commits[_place(row)] = row, made
    found |= {_place(row): row for row in rows}
    commits |= {
        _place(row): _told([run for run in runs if run.get("model", row.model) == row.model], "commit") for row in rows
    }
    known = [*kept["runs"], *(run for run in runs if run not in kept["runs"])]
    known = [run for run in known if run.get("commit") in {*commits.values(), None}]  # of the others no row is left
    if found:
        told = [{**row.to_json(), "commit": commits[place]} for place, row in found.items()]
        parts = {"runs": known, "rows": told}
        lists = (f'"{name}": [\n' + ",\n".join(map(json.dumps, part)) + "\n]" for name, part in parts.items())
        path.write_text("{" + ", ".join(lists) + "}\n", encoding="utf-8")
    return list(found.values()), known, commits


def _failures(folder: Path) -> dict[tuple[str, int, str, str], str]:
    """Why cells could not be read, by model, length, method and task."""
    path = folder / "failed.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["model"], line["length"], line["method"], line["task"]): line["error"] for line in lines}


def _reasons(rows: Sequence[Row], failed: dict[tuple[str, str], str]) -> list[str]:
    """One line for each reason why cells of a table hold no figure."""
    missing = {(row.method, row.task): row.reason for row in rows if row.score is None and row.reason}
    methods_of: dict[str, list[str]] = {}
    for (method, task), reason in {**failed, **missing}.items():
        methods_of.setdefault(reason.split(". GPU ")[0], []).append(f"{method} ({task})")  # not who else was there
    lines = [f"- {', '.join(cells)}: {reason}" for reason, cells in methods_of.items()]
    return ["Without a figure:", "", *lines, ""] if lines else []


def _table(rows: Sequence[Row], failed: dict[tuple[str, str], str], commits: dict[Place, str]) -> list[str]:
    wanted = [*TASKS.split(","), *(row.task for row in rows)]
    tasks = sorted({row.task for row in rows}, key=wanted.index)
    names = list(dict.fromkeys(row.method for row in rows))
    lines = [f"| method | {' | '.join(tasks)} | entries | seconds | GiB (texts) | commit |"]
    lines.append(f"|---|{'---|' * (len(tasks) + 4)}")
    known = [*METHODS.split(","), *names]
    for name in sorted(names, key=known.index):
        own = {row.task: row for row in rows if row.method == name}
        asked = [row for row in own.values() if row.unit == "percent" and row.score is not None]
        costs = (
            _mean(asked, "entries_per_query", "{:,.0f}"),
            _mean(asked, "seconds", "{:.2f}"),
            _peak(asked),
        )
        cells = [_cell(own.get(task), (name, task) in failed) for task in tasks]
        made = ", ".join(dict.fromkeys(commits[_place(row)] for row in own.values()))
        lines.append(f"| {name} | {' | '.join([*cells, *costs, made])} |")
    return lines


def _cell(row: Row | None, failed: bool) -> str:
    if row is None:
        return "failed" if failed else "not measured"
    if row.score is None:
        return row.status
    error = "" if row.stderr is None else f" ± {row.stderr:.1f}" if row.unit == "percent" else f" ± {row.stderr:.3f}"
    return (f"{row.score:.0f}" if row.unit == "percent" else f"{row.score:.3f}") + f"{error} ({row.trials})"


def _peak(rows: Sequence[Row]) -> str:
    """The highest peak, and how many texts were read at once."""
    known = [(row.peak_memory_bytes, row.settings.get("batch_size", 1)) for row in rows if row.peak_memory_bytes]
    return f"{max(known)[0] / 2**30:.1f} ({max(known)[1]})" if known else ""


def _mean(rows: Iterable[Row], field: str, form: str) -> str:
    found = [getattr(row, field) for row in rows if getattr(row, field) is not None]
    return form.format(fmean(found)) if found else ""


def _points(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Mean score over the question tasks, and entries, of the methods that were asked all of them."""
    asked = [row for row in rows if row.unit == "percent" and row.score is not None]
    tasks = {row.task for row in asked}
    found = {}
    for name in dict.fromkeys(row.method for row in asked):
        own = [row for row in asked if row.method == name]
        if {row.task for row in own} == tasks:
            found[name] = (fmean(row.entries_per_query or 0 for row in own), fmean(row.score or 0 for row in own))
    return found


def _frontier(rows: Sequence[Row]) -> str:
    points = _points(rows)
    best = [
        name
        for name, (entries, score) in points.items()
        if score > 0 and not any(e <= entries and s >= score and (e, s) != (entries, score) for e, s in points.values())
    ]
    if "dense" not in points:
        return "Dense attention was not read here, so nothing is said of a frontier."
    if not best:
        return "No method found anything here."
    shown = ", ".join(f"{name} ({points[name][1]:.0f} % at {points[name][0]:,.0f})" for name in sorted(best))
    return f"On the frontier of mean score against entries read: {shown}."


def _plot_quality(rows: Sequence[Row], path: Path) -> None:
    plots = pyplot()
    models = list(dict.fromkeys(row.model for row in rows))
    places = dict.fromkeys((row.model, row.length) for row in rows)
    cells = {place: _points([row for row in rows if (row.model, row.length) == place]) for place in places}
    lengths = sorted({length for (_, length), points in cells.items() if len(points) > 1})
    if not lengths:
        return
    figure, axes = plots.subplots(
        len(models), len(lengths), figsize=(4.2 * len(lengths), 3.6 * len(models)), squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        for axis, length in zip(line, lengths, strict=True):
            for name, (entries, score) in cells.get((model, length), {}).items():
                axis.plot(
                    entries, score, "o", color="C3" if name.startswith("mgam") else "C0" if name != "dense" else "black"
                )
                axis.annotate(name, (entries, score), fontsize=7, xytext=(3, 3), textcoords="offset points")
            axis.set(title=f"{model}, {length // 1024}k", xscale="log", xlabel="entries read per query", ylim=(-5, 105))
        line[0].set_ylabel("mean score, percent")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _trained(folder: Path) -> str:
    path = folder / "trained.jsonl"
    if not path.exists():
        return ""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    text = [
        "# Methods that must be trained",
        "",
        "Small decoders from scratch: two layers of four heads. Accuracy in percent on unseen texts, and the steps it "
        "took: a training ends at 99.5 %.",
        "",
    ]
    for length in sorted({line["length"] for line in lines}):
        here = [line for line in lines if line["length"] == length]
        cpu = here[0]["device"] == "cpu"
        shared = "" if cpu else f"; {here[0]['processes']} processes shared the device"
        text += [
            f"## {length} tokens",
            "",
            f"Width {here[0]['width']}, steps of {here[0]['rows']} texts, at most {_most_steps(here)}; "
            f"{_of_all(here, 'machine')}, commit {_of_all(here, 'commit')}{shared}. "
            f"{'Sizes are halved (`HALVES` in trained.py). ' if any(line.get('sizes') for line in here) else ''}"
            f"Seconds are those of {'one core' if cpu else 'the clock'}, of all three tasks.",
            "",
            f"| method | {' | '.join(tasks)} | seconds |",
            f"|---|{'---|' * (len(tasks) + 1)}",
        ]
        for name in dict.fromkeys(line["method"] for line in here):
            own = [line for line in here if line["method"] == name]
            cells = [_accuracy([line for line in own if line["task"] == task]) for task in tasks]
            seconds = sum(line.get("core_seconds" if cpu else "seconds", line["seconds"]) for line in own)
            text.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
        text.append("")
    return "\n".join(text)


def _most_steps(lines: Sequence[dict[str, Any]]) -> str:
    most = {line["task"]: line["steps_at_most"] for line in lines}
    return ", ".join(f"{steps:,} ({task})" for task, steps in most.items())


def _of_all(lines: Sequence[dict[str, Any]], key: str) -> str:
    return ", ".join(dict.fromkeys(str(line[key]) for line in lines))


def _accuracy(lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return "not measured"
    found = [100 * line["accuracy"] for line in lines]
    spread = f" ± {stdev(found) / len(found) ** 0.5:.1f}" if len(found) > 1 else ""
    steps = [line["steps"] for line in lines if line["steps"] is not None]  # not known of some early runs
    return f"{fmean(found):.1f}{spread} ({f'{median(steps):,.0f} steps' if steps else 'learned early'})"


def _growth(folder: Path) -> str:
    path = folder / "growth.jsonl"
    if not path.exists():
        return ""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = list(dict.fromkeys(line["method"] for line in lines))
    text = [
        "# Growth",
        "",
        f"{_of_all(lines, 'machine')}, commit {_of_all(lines, 'commit')}. One layer of 8 query heads and 2 KV heads of "
        "64 dimensions, batch 1; decoders read in calls of 32,768 tokens in bfloat16 (on a CPU of 2,048, in float32), "
        "modules in one pass in float32. Seconds of a CPU are those of one core; a pass that takes long is not "
        "repeated. The exponent is the slope of log time over log length in the longer half of the lengths; the "
        "claimed one is that of reading a text, for methods of generation that of one token.",
        "",
        "| method | timed as | longest | seconds | spread | MiB | exponent | of a token | claimed | MiB kept |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        own = sorted((line for line in lines if line["method"] == name), key=lambda line: line["length"])
        last = own[-1]
        slope = exponent([(line["length"], median(line["seconds"])) for line in own])
        tokens = [(line["length"], line["token_seconds"]) for line in own if "token_seconds" in line]
        step = exponent(tokens) if tokens else None
        claimed = f"{last['grows']:g}" + (" (token)" if methods.get(name).phase == "decode" else "")
        spread = f"{min(last['seconds']):.3g} to {max(last['seconds']):.3g}"
        text.append(
            f"| {name} | {last['form']} | {last['length']:,} | {median(last['seconds']):.4g} | {spread} | "
            f"{_mebibytes(last.get('peak_bytes'))} | {_number(slope)} | {_number(step)} | {claimed} | "
            f"{_mebibytes(last.get('kept_bytes'))} |"
        )
    _plot_growth(lines, names, folder / "growth.svg")
    return "\n".join([*text, ""])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


def _plot_growth(lines: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    plots = pyplot()
    figure, axes = plots.subplots(1, 3, figsize=(20, 5.5))
    wanted = (
        ("seconds of reading a text", lambda line: median(line["seconds"])),
        ("seconds of one generated token", lambda line: line.get("token_seconds")),
        ("MiB above what was held before", lambda line: line["peak_bytes"] and line["peak_bytes"] / 2**20),
    )
    for axis, (title, value) in zip(axes, wanted, strict=True):
        for number, name in enumerate(names):
            points = sorted((line["length"], value(line)) for line in lines if line["method"] == name and value(line))
            if points:
                style = ("-", "--", ":")[number // 10]
                slope = exponent(points)
                decodes = methods.get(name).phase == "decode"
                claimed = methods.get(name).grows if decodes == ("token" in title) and "MiB" not in title else None
                label = f"{name} {_number(slope)}" + ("" if claimed is None else f" ({claimed:g})")
                color, width = {"dense": ("black", 3.0), "mgam": ("red", 3.0)}.get(name, (f"C{number % 10}", 1.2))
                axis.plot(*zip(*points, strict=True), style, marker=".", label=label, color=color, linewidth=width)
        axis.set(title=title, yscale="log", xlabel="tokens")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k")
        about = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        axis.legend(fontsize=7, title="exponent measured (claimed)", title_fontsize=7, **about)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})

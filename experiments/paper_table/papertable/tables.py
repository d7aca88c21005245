"""Markdown of what was measured, beside what the paper claims."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mgam.errors import SettingError
from papertable import growth, plots
from papertable.compared import ablations, cuts, hops
from papertable.figures import CLAIMED, CLAIMED_MARGINS, Figure, figure, grown, margin, scores
from papertable.library import TASKS
from papertable.markdown import NONE, Results, number, shown, table
from papertable.models import FULL, MODELS
from papertable.plan import chosen_rate, dev_score, results
from papertable.score import ROUGES
from papertable.sizes import SIZES, Size

LONG = 16384
"""Tokens from which on MGAM is to be faster."""


def write(folder: Path) -> list[Path]:
    """`table.md` and plots, in the folder of runs.

    Raises:
        SettingError: the folder holds no runs.
    """
    if not (folder / "setting.json").is_file():
        raise SettingError(f"{folder} holds no runs; make some with: run.py train --out {folder}")
    setting, found = json.loads((folder / "setting.json").read_text()), results(folder)
    size, points = SIZES[setting["size"]], growth.read(folder)
    base = json.loads((folder / "baselines.json").read_text())
    parts = [
        _head(setting, found),
        *_main(found, points, size),
        *(_verdict(found, points, growth.read(folder, replayed=True)) if setting["size"] == "paper" else ()),
        *_cells(found, size, base),
        *_tuning(found, size),
        *ablations(found),
        *_mixed(found, points, size, base),
        *hops(found, base),
        *cuts(found),
        *_growth(points, growth.read(folder, replayed=True)),
    ]
    path = folder / "table.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [path, *plots.draw(folder, found, points)]


def _head(setting: dict[str, Any], found: Results) -> str:
    known = [result["conditions"] for result in found.values()]
    where = "; ".join(
        sorted({f"{one['device']}, commit {one['commit']}, torch {one['versions']['torch']}" for one in known})
    )
    check = (
        "" if setting["size"] == "paper" else f" A check of the machinery at `{setting['size']}` size, not the table."
    )
    refused = ", ".join(f"{task} {count}" for task, count in setting["refused"].items())
    return (
        f"# The paper's table: what was measured\n\n{len(found)} runs finished.{check} Data: {setting['data']} "
        f"(library {setting['library']}; documents refused: {refused}). {where or 'Nothing finished'}. "
        "What all of it means stands in PROTOCOL.md. Mean ± half of a 95 % t-interval over seeds; accuracy, F1 and "
        "ROUGE in percent."
    )


def _main(found: Results, points: list[dict[str, Any]], size: Size) -> Iterator[str]:
    longest = size.stages[-1][0]
    head = [
        "model", "seeds", "accuracy", "F1", "ROUGE-1 / 2 / Lsum of summaries", f"entries a query at {longest:,}",
        f"step of one row at {longest:,}, ms", "its peak memory, GB", "parameters, M", "paper: accuracy / F1",
    ]  # fmt: skip
    rows = []
    for model in MODELS:
        own = [result for name, result in found.items() if name.rsplit("-", 1)[0] == model]
        lost = [result for result in own if result["diverged"] is not None]
        memory = grown(points, model, longest, "step_peak_bytes")
        claimed = CLAIMED.get(model)
        entries = [sum(v for k, v in result["test"]["entries"][str(longest)].items() if k.startswith(("tok", "lev")))
                   for result in own if "test" in result and str(longest) in result["test"]["entries"]]  # fmt: skip
        rows.append([
            model, f"{len(own)}{f', {len(lost)} diverged (counted as 0)' if lost else ''}",
            *(shown(figure(scores(found, model, name))) for name in ("accuracy", "f1")),
            " / ".join(shown(figure(scores(found, model, name))) for name in ROUGES) if own else NONE,
            number(sum(entries) / len(entries) if entries else None, 0),
            number(grown(points, model, longest, "step_ms"), 1), number(memory and memory / 1e9, 2),
            number(own[0]["parameters"] / 1e6 if own else None, 2),
            f"{claimed[0]} / {claimed[1]}" if claimed else "",
        ])  # fmt: skip
    yield "## All tasks and lengths\n\n" + table(head, rows)
    rows = [
        [f"{left} over {right}", *(shown(margin(found, left, right, name)) for name in ("accuracy", "f1")),
         " / ".join(map(str, CLAIMED_MARGINS)) if (left, right) == ("mgam", "longformer") else ""]
        for left in ("mgam", "mgam-causal") for right in ("longformer", "bert", "gpt2")
    ]  # fmt: skip
    yield "Margins over the same seeds:\n\n" + table(["", "accuracy", "F1", "paper: accuracy / F1"], rows)


def _verdict(found: Results, points: list[dict[str, Any]], replayed: list[dict[str, Any]]) -> Iterator[str]:
    def long(lines: list[dict[str, Any]], other: str, name: str) -> list[float | None]:
        """What a step of MGAM has more than one of another model, at each length."""
        lengths = sorted(line["length"] for line in lines if line["model"] == "mgam" and line["length"] >= LONG)
        return [_less(*(grown(lines, model, one, name) for model in ("mgam", other))) for one in lengths]

    rows = [
        *_led(found),
        [f"peak memory of a step not above its at {LONG:,} tokens and above",
         _all(long(points, "longformer", "step_peak_bytes"), 0.0)],
        ["nor above that of full attention (bert)", _all(long(points, "bert", "step_peak_bytes"), 0.0)],
        [f"a step faster than bert's at {LONG:,} tokens and above", _all(long(points, "bert", "step_ms"), -1e-9)],
        ["and than gpt2's", _all(long(points, "gpt2", "step_ms"), -1e-9)],
        ["a step faster than bert's, both replayed as CUDA graphs", _all(long(replayed, "bert", "step_ms"), -1e-9)],
    ]  # fmt: skip
    yield "## What was to be reached (MGAM both ways)\n\n" + table(["", ""], rows)


def _led(found: Results) -> list[list[str]]:
    """What was to be reached on F1."""
    apart = [margin(found, "mgam", full, "f1") for full in FULL]
    worst = None if None in apart else min((one for one in apart if one), key=lambda one: one.mean)
    return [
        ["F1 at most 1 point below the better full attention", _reached(worst, -1.0)],
        ["F1 ahead of the Longformer-like model", _reached(margin(found, "mgam", "longformer", "f1"), 1e-9)],
    ]


def _reached(apart: Figure | None, least: float) -> str:
    """Whether a mean difference is large enough, with the difference and its seeds."""
    if apart is None:
        return NONE
    return f"{_yes(apart.mean >= least)} ({apart}, {apart.seeds} seed{'s' if apart.seeds > 1 else ''})"


def _less(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _all(differences: list[float | None], most: float) -> str:
    """Whether none is more."""
    known = [one for one in differences if one is not None]
    return _yes(all(one <= most for one in known) if known and len(known) == len(differences) else None)


def _cells(found: Results, size: Size, base: dict[str, Any]) -> Iterator[str]:
    lengths = [str(length) for length, _ in size.test]
    for name, title in (("accuracy", "Accuracy"), ("f1", "F1")):
        tasks = [task for task in TASKS if task != "lead" or name == "accuracy"]
        rows = []
        for model in MODELS:
            row = [model, str(sum(run.rsplit("-", 1)[0] == model for run in found))]
            for task in tasks:
                for length in lengths:
                    values = [
                        result["test"]["scores"][task][length][name] if result["diverged"] is None else 0.0
                        for run, result in found.items() if run.rsplit("-", 1)[0] == model
                    ]  # fmt: skip
                    row.append(shown(figure(values)))
            rows.append(row)
        beside = {"chance": 1} if name == "accuracy" else {}
        for baseline, digits in {**beside, "first hop": 1, "oracle": 0, "silence": 0}.items():
            values = [base[task][one].get(f"{baseline} {name}") for task in tasks for one in lengths]
            if any(value is not None for value in values):
                said = f"{baseline} alone" if baseline == "first hop" else baseline
                rows.append([said, "", *("" if value is None else f"{value:,.{digits}f}" for value in values)])
        head = ["", "seeds", *(f"{task} {int(one):,}" for task in tasks for one in lengths)]
        yield f"## {title} by task and length\n\n" + table(head, rows)
    reach = " ".join(
        f"{int(one):,} tokens: " + ", ".join(
            f"{rouge} {base['lead'][one][f'oracle {rouge}']:.1f} (at random {base['lead'][one][f'chance {rouge}']:.1f})"
            for rouge in ROUGES) + "." for one in lengths
    )  # fmt: skip
    yield f"ROUGE of the gold sentences against the lead, the most that can be reached: {reach}"


def _tuning(found: Results, size: Size) -> Iterator[str]:
    rows = []
    for model in MODELS:
        tried = [found.get(f"tune-{model}-{rate:g}") for rate in size.rates]
        used = [one["run"]["rate"] for name, one in found.items() if name.rsplit("-", 1)[0] == model]
        chosen = used[0] if used else chosen_rate(model, size, found)
        said = ["diverged" if one and one["diverged"] else f"{dev_score(one):.1f}" if one else NONE for one in tried]
        rows.append([model, *said, f"{chosen:g}" if chosen else NONE])
    yield "## Learning rates, on dev\n\nMean of pooled accuracy and F1.\n\n" + table(
        ["model", *(f"{rate:g}" for rate in size.rates), "chosen"], rows
    )


def _mixed(found: Results, points: list[dict[str, Any]], size: Size, base: dict[str, Any]) -> Iterator[str]:
    own = {name.removeprefix("mixed-"): result for name, result in found.items() if name.startswith("mixed-")}
    verdict = "## What was to be reached\n\n" + table(["", ""], _led(own))
    for part in (*_main(own, points, size), verdict, *_cells(own, size, base)) if own else ():
        yield part.replace("## ", "## Lengths mixed in training: ")


def _growth(points: list[dict[str, Any]], replayed: list[dict[str, Any]]) -> Iterator[str]:
    if not points:
        yield f"## Growth\n\n{NONE}."
        return
    lengths = sorted({line["length"] for line in points})
    models = [model for model in MODELS if any(model == line["model"] for line in points)]
    for name, unit, scale, lines in (
        ("step_ms", "Training step, ms", 1.0, points), ("forward_ms", "Forward pass, ms", 1.0, points),
        ("step_peak_bytes", "Peak memory of a training step, GB", 1e9, points),
        ("step_ms", "Training step replayed as one CUDA graph, ms", 1.0, replayed),
    ):  # fmt: skip
        if not lines:
            continue
        where = "; ".join(
            sorted({f"models of {one['size']} size, {one['machine']}, commit {one['commit']}" for one in lines})
        )
        known = {(line["model"], line["length"]): line for line in lines}
        rows = []
        for model in models:
            cells = [known.get((model, length), {}) for length in lengths]
            rows.append([model, *(number(one[name] / scale, 2) if name in one else one.get("failed", NONE)
                                  for one in cells)])  # fmt: skip
        yield f"## {unit}, one row\n\n{where}.\n\n" + table(["model", *(f"{one:,}" for one in lengths)], rows)
    there = {(line["model"], line["length"]): line for line in points}
    rows = []
    for model in (one for one in models if one.startswith("mgam")):
        for part in ("pyramid", "policy"):
            shares = [
                (one.get(f"{part}_ms"), one.get("forward_ms")) for one in (there.get((model, n), {}) for n in lengths)
            ]
            rows.append(
                [f"{model}: {part}", *(f"{a:.2f} ({100 * a / b:.0f} %)" if a and b else NONE for a, b in shares)]
            )
    yield "## Overhead, ms of all layers (share of a forward pass)\n\n" + table(
        ["", *(f"{one:,}" for one in lengths)], rows
    )


def _yes(known: bool | None) -> str:
    return NONE if known is None else "yes" if known else "no"

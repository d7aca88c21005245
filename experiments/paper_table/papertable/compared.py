"""Runs that are compared with MGAM as it is: ablations, remedies, and what must be read afar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from papertable.figures import apart
from papertable.markdown import NONE, Results, number, shown, table
from papertable.measure import CUTS, EACH
from papertable.models import ABLATIONS, FAR, REMEDIES
from papertable.plan import ABLATION_SEEDS, pooled

CUT, READ = list(CUTS), ("heads", "any head", "chance")
READERS = {"answer": "the block of <answer>", "question": "the first block", "between": "the evidence's blocks"}


def ablations(found: Results) -> Iterator[str]:
    """Ablations on hop; ablations and remedies on the task whose question stands far from its evidence."""
    runs = [(f"ablation-{name}", name) for name in ABLATIONS]
    yield "## Ablations\n\n" + _compared(found, runs, "MGAM both ways, hop alone")
    own = [f"remedy: {name}" if name in REMEDIES else name for name in FAR]
    yield "## Question far from its evidence\n\n" + _compared(
        found, [(f"far-{name}", said) for name, said in zip(FAR, own, strict=True)], "far alone, lengths mixed"
    )


def _compared(found: Results, runs: Sequence[tuple[str, str]], title: str) -> str:
    """Runs of one task, seed by seed, against MGAM as it is; what they read, and how much of the evidence."""
    longest, rows, every = "", [], {}
    for run, _ in runs:
        own = {seed: found.get(f"{run.replace(' ', '-')}-{seed}") for seed in range(ABLATION_SEEDS)}
        every[run] = {seed: one for seed, one in own.items() if one}
    as_it_is = next(every[run] for run in every if run.endswith("as it is"))
    for run, said in runs:
        kept = list(every[run].values())
        row = [said, str(len(kept))]
        for wanted in ("accuracy", "f1"):
            values = [
                0.0 if one["diverged"] is not None else pooled(one["test"]["scores"], wanted) or 0.0 for one in kept
            ]
            row.append(", ".join(f"{value:.1f}" for value in values) or NONE)
        row.append(" / ".join(f"{value:.0f}" for _, value in by_length(found, run)))
        both = [seed for seed in every[run] if seed in as_it_is]
        sides = ([side[seed].get("test", {}) for seed in both] for side in (every[run], as_it_is))
        row.append("" if every[run] is as_it_is else shown(apart(*sides, "f1")))
        entries = [list(one["test"]["entries"].items())[-1] for one in kept if "test" in one]
        longest = entries[0][0] if entries else longest
        total = [sum(v for k, v in one.items() if k.startswith(("tok", "lev"))) for _, one in entries]
        row.append(number(sum(total) / len(total) if total else None, 0))
        for reader in READERS:
            parts = [[one.get(f"{reader} reads evidence, {what}") for _, one in entries] for what in READ]
            if reader == "answer":  # the one share that the first runs counted
                parts[0] += [one.get("gold read as tokens") for _, one in entries]
            known = [[value for value in part if value is not None] for part in parts]
            row.append(" / ".join(f"{100 * sum(one) / len(one):.1f}" for one in known if one))
        rows.append(row)
    lengths = dict.fromkeys(length for run, _ in runs for length, _ in by_length(found, run))
    across = " / ".join(f"{length // 1024}k" for length in lengths)
    head = [title, "seeds", "accuracy of each", "F1 of each", f"accuracy at {across}", "F1 over as it is",
            "entries a query",
            *(f"read by {who}" for who in READERS.values())]  # fmt: skip
    return (
        "Differences with a 95 % interval over the same test samples, of these trainings. Entries, and evidence "
        f"read as tokens where it is outside the reader's window, at {longest or 'the most'} tokens: % of heads / by "
        "any head of any layer / of a policy of chance that opens as many chunks.\n\n" + table(head, rows)
    )


def by_length(found: Results, run: str) -> list[tuple[int, float]]:
    """Mean accuracy over the seeds of an ablation or a run of `far`, and over its tasks, by length."""
    own = [found.get(f"{run.replace(' ', '-')}-{seed}") for seed in range(ABLATION_SEEDS)]
    tests = [one["test"]["scores"] for one in own if one and "test" in one]
    lengths = list(next(iter(tests[0].values()))) if tests else []
    means = ([pooled(scores, "accuracy", length) or 0.0 for scores in tests] for length in lengths)
    return [(int(length), sum(values) / len(values)) for length, values in zip(lengths, means, strict=True)]


def hops(found: Results, base: dict[str, Any]) -> Iterator[str]:
    """Which of the two lines of hop is found."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, result in found.items():
        cells = result.get("test", {}).get("scores", {}).get("hop", {})
        if not result["run"]["tuning"] and any("last hop" in cell for cell in cells.values()):
            kinds.setdefault(name.rsplit("-", 1)[0], []).append(cells)
    if not kinds:
        return
    lengths = list(next(iter(kinds.values()))[0])
    rows = []
    for kind, runs in kinds.items():
        cells = [
            " / ".join(f"{sum(one[n][hop] for one in runs) / len(runs):.1f}" for hop in ("first hop", "last hop"))
            for n in lengths
        ]
        rows.append([kind, str(len(runs)), *cells])
    alone = [base["hop"].get(length, {}).get("first hop accuracy") for length in lengths]
    rows.append(["first hop alone", "", *("" if one is None else f"100 / {2 * one - 100:.1f}" for one in alone)])
    yield (
        "## Hop: the line that tells the country / the line that answers, % found\n\n"
        "`first hop alone`: finds the first, and takes any line with the label that is asked for.\n\n"
        + table(["", "seeds", *(f"{int(one):,}" for one in lengths)], rows)
    )


def cuts(found: Results) -> Iterator[str]:
    """What becomes of trained models that read otherwise in the test."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, result in found.items():
        if "read otherwise" in result:
            kinds.setdefault(name.rsplit("-", 1)[0], []).append(result)
    rows = []
    for kind, runs in kinds.items():
        cells = runs[0]["read otherwise"][CUT[0]]["scores"]
        for task, length in ((task, length) for task, lengths in cells.items() for length in lengths):
            for name in EACH:
                if name not in cells[task][length]:
                    continue
                row = [kind, str(len(runs)), task, f"{int(length):,}", "F1" if name == "f1" else name]
                tests = [[one["test"]] + [one["read otherwise"].get(cut) for cut in CUT] for one in runs]
                for way in zip(*tests, strict=True):
                    values = [one["scores"][task][length][name] for one in way if one]
                    row.append(number(sum(values) / len(values) if values else None, 1))
                rows.append(row)
    if rows:
        yield "## MGAM reading otherwise in the test than in training\n\n" + table(
            ["runs", "seeds", "task", "tokens", "", "as trained", *CUT], rows
        )

"""The main job in figures: reading speed and memory against dense, hits, and loss.

    python benchmarks/main_job.py                     everything, on the device at hand
    python benchmarks/main_job.py --quick             needles as two cores can read them: 2k and 8k tokens, 5 trials
    python benchmarks/main_job.py --parts reading     some parts: reading, passkey, needles, loss

Cells that are done stay done: a killed run goes on where it stopped. Dense is read by the same calls in the same run.
Results with their conditions go to benchmarks/results/main_job.<device>.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mgam.evaluation.machine import conditions
from mgam.integrations.loading import resolve_device

HERE = Path(__file__).parent
TEXT = HERE.parent / "examples"
READING_LENGTHS = (4096, 8192, 32768, 65536)
PARTS = ("reading", "passkey", "needles", "loss")
KEEP_OUT = ["--keep-out", "64,768"]  # the sink and what every method reads anyway
PASSKEY = ["--tasks", "passkey", "--lengths", "16k,32k", "--trials", "10", *KEEP_OUT]
NEEDLES = ["--tasks", "needle_prose", "--prose", "novels", "--lengths", "2k,8k,32k", "--trials", "20", *KEEP_OUT]
QUICK_NEEDLES = ["--tasks", "needle_prose", "--prose", "novels", "--lengths", "2k,8k", "--trials", "5", *KEEP_OUT]
LOSS = ["--tasks", "loss_novels", "--lengths", "8k", "--trials", "4"]  # losses are read without lookahead


def main(
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}; commas between.")] = ",".join(PARTS),
    quick: Annotated[bool, typer.Option("--quick", help="Only needles, at 2k and 8k, 5 trials.")] = False,
    results: Annotated[Path | None, typer.Option(help="Where finished cells are kept.")] = None,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Makes the missing cells, then prints all."""
    if cell is not None:
        print(json.dumps(_read_cell(model, device, **json.loads(cell))))
        return
    device = str(resolve_device(device))
    path = results or HERE / "results" / f"main_job.{device}{f'.{Path(model).stem}' if model else ''}.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    wanted = ["needles"] if quick else parts.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise SystemExit(f"--parts {parts}: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    for key, make in _cells(model, device, wanted, quick):
        if key in cells:
            continue
        begin = time.perf_counter()
        print(f"{key} ...", file=sys.stderr, flush=True)
        cells[key] = {**make(), "wall_seconds": round(time.perf_counter() - begin, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cells, indent=1) + "\n")
    _print(cells)


def _cells(model: str | None, device: str, parts: list[str], quick: bool) -> Any:
    """Each cell's key and the function that makes it."""
    if "reading" in parts:
        for length in READING_LENGTHS:
            for method in ("dense", "mgam"):
                spec = {"length": length, "method": method}
                yield f"reading {method} {length}", lambda spec=spec: _in_a_process(model, device, spec)
    evaluations = {"passkey": PASSKEY, "needles": QUICK_NEEDLES if quick else NEEDLES, "loss": LOSS}
    for part, words in evaluations.items():
        if part in parts:
            yield "quick needles" if quick else part, lambda words=words: _eval(model, device, words)


def _in_a_process(model: str | None, device: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A reading in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--device", device, "--cell", json.dumps(spec)]
    command += [] if model is None else ["--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{spec} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _read_cell(model: str | None, device: str, length: int, method: str) -> dict[str, Any]:
    """Reads `length` tokens of the shipped text and asks one question."""
    import mgam
    from mgam.documents.asking import ask
    from mgam.documents.sources import Source
    from mgam.integrations.loading import load

    loaded, tokenizer = load(model, device=device)[:2]
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(TEXT.glob("*.txt")))
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) < length:
        raise SystemExit(f"the shipped text has {len(offsets)} tokens, {length} are needed")
    source = Source("shipped", text[: offsets[length - 1][1]])
    if method != "dense":
        mgam.apply(loaded, method)
    answer = ask(loaded, tokenizer, [source], "What is this text about?", max_new_tokens=16)
    produced = max(1, answer.tokens["answer"])
    return {
        "reading_seconds": answer.seconds["reading"],
        "seconds_per_new_token": round(answer.seconds["answering"] / produced, 4),
        "peak_memory_bytes": answer.peak_memory_bytes,
        "tokens": answer.tokens["document"],
        "entries_per_level": answer.entries_per_level,
        "settings": answer.settings,
        "conditions": conditions(str(loaded.device)),
    }


def _eval(model: str | None, device: str, words: list[str]) -> dict[str, Any]:
    """Rows of `mgam eval`, dense beside mgam; on a GPU the trials of a cell are read as one batch."""
    words = ["eval", *words, "--methods", "mgam", "--device", device]
    words += [] if device == "cpu" else ["--batch-size", "10"]
    words += [] if model is None else ["--model", model]
    done = subprocess.run(
        [sys.executable, "-m", "mgam", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"mgam {' '.join(words)} ended with {done.returncode}")
    return {"command": " ".join(["mgam", *words]), "rows": json.loads(done.stdout), "conditions": conditions(device)}


def _print(cells: dict[str, Any]) -> None:
    console = Console()
    reading = Table(
        "tokens",
        "dense s",
        "mgam s",
        "faster",
        "dense peak GiB",
        "mgam peak GiB",
        "memory ratio",
        title="Reading, end to end",
    )
    for length in READING_LENGTHS:
        dense, ours = (cells.get(f"reading {method} {length}") for method in ("dense", "mgam"))
        if dense and ours:
            a, b = dense["reading_seconds"], ours["reading_seconds"]
            p, q = dense["peak_memory_bytes"], ours["peak_memory_bytes"]
            reading.add_row(
                f"{length:,}",
                f"{a:.1f}",
                f"{b:.1f}",
                f"{a / b:.2f}x",
                f"{p / 2**30:.2f}",
                f"{q / 2**30:.2f}",
                f"{q / p:.2f}",
            )
    console.print(reading)
    hits = Table("task", "tokens", "method", "trials", "score (95 %)", "entries per query", title="Hits and loss")
    for row in (row for cell in cells.values() if isinstance(cell, dict) for row in cell.get("rows", [])):
        hits.add_row(
            row["task"],
            f"{row['length']:,}",
            row["method"],
            str(row["trials"]),
            f"{row['score']:.3f} ({row['low']:.1f} to {row['high']:.1f})",
            f"{row['entries_per_query']:,.0f}",
        )
    console.print(hits)


if __name__ == "__main__":
    typer.run(main)

"""The main job in figures: reading speed and memory against dense, hits, and loss.

    python benchmarks/main_job.py                     everything, on the device at hand
    python benchmarks/main_job.py --quick             what two cores can do: short needles, few trials
    python benchmarks/main_job.py --parts reading     one part: reading, hits, loss
    python benchmarks/main_job.py --sampled           dense reading beyond 32k from four of its calls, marked as such

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

HERE = Path(__file__).parent
TEXT = HERE.parent / "examples"
READING_LENGTHS = (4096, 8192, 32768, 65536)


def main(
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    parts: Annotated[str, typer.Option(help="Of reading, hits, loss; commas between.")] = "reading,hits,loss",
    quick: Annotated[bool, typer.Option("--quick", help="Needles at 2k and 8k only, 5 trials.")] = False,
    sampled: Annotated[bool, typer.Option("--sampled", help="Dense beyond 32k: time four calls and sum up.")] = False,
    results: Annotated[Path | None, typer.Option(help="Where finished cells are kept.")] = None,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Makes the missing cells, then prints all."""
    if cell is not None:
        spec = json.loads(cell)
        print(json.dumps((_sample_cell if spec.pop("sampled", False) else _read_cell)(model, device, **spec)))
        return
    name = Path(model or "embedded").stem
    path = results or HERE / "results" / f"main_job.{device}.{name}.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    wanted = parts.split(",")
    for key, make in _cells(model, device, wanted, quick, sampled):
        if key in cells:
            continue
        begin = time.perf_counter()
        print(f"{key} ...", file=sys.stderr, flush=True)
        cells[key] = {**make(), "wall_seconds": round(time.perf_counter() - begin, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cells, indent=1) + "\n")
    _print(cells)


def _cells(model: str | None, device: str, parts: list[str], quick: bool, sampled: bool) -> Any:
    """Each cell's key and the function that makes it."""
    if "reading" in parts:
        for length in READING_LENGTHS:
            for method in ("dense", "mgam"):
                spec = {"length": length, "method": method}
                if sampled and method == "dense" and length > 32768:
                    spec["sampled"] = True
                yield f"reading {method} {length}", lambda spec=spec: _in_a_process(model, device, spec)
    trials = {"passkey": 10, "needle_prose": 5 if quick else 20}
    lengths = {"passkey": "16k,32k", "needle_prose": "2k,8k" if quick else "2k,8k,32k"}
    if "hits" in parts:
        for task in ("passkey", "needle_prose"):
            yield (
                f"hits {task} {lengths[task]}",
                lambda task=task: _eval(model, device, task, lengths[task], trials[task]),
            )
    if "loss" in parts:
        yield "loss 8k", lambda: _eval(model, device, "loss_novels", "8k", 4)


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
    from mgam.evaluation.machine import conditions
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


def _sample_cell(model: str | None, device: str, length: int, method: str) -> dict[str, Any]:
    """Dense reading from four of its calls: a call's cost grows linearly with its position, so midpoints sum up.

    The cache is filled with random keys and values, which cost what real ones cost; the peak is that of the last call.
    """
    import torch
    from transformers import DynamicCache

    from mgam.evaluation.machine import conditions
    from mgam.integrations.loading import load
    from mgam.integrations.memory import peak_memory_bytes
    from mgam.integrations.transformers.call_size import LEAST as CALL

    loaded = load(model, device=device)[0]
    config = loaded.config.get_text_config(decoder=True)
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    calls = length // CALL
    seconds = []
    for part in range(4):
        place = int((part + 0.5) * calls / 4) * CALL - CALL // 2
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(1, heads, place, dim), torch.randn(1, heads, place, dim), layer)
        ids = torch.zeros(1, CALL, dtype=torch.long)
        begin = time.perf_counter()
        with torch.no_grad():
            loaded.get_decoder()(
                input_ids=ids,
                position_ids=torch.arange(place, place + CALL)[None],
                past_key_values=cache,
                use_cache=True,
            )
        seconds.append(time.perf_counter() - begin)
        del cache
    return {
        "reading_seconds": round(sum(seconds) / 4 * calls, 1),
        "sampled_calls": [round(one, 2) for one in seconds],
        "peak_memory_bytes": peak_memory_bytes(),
        "tokens": length,
        "settings": {"method": method},
        "conditions": conditions(str(loaded.device)),
    }


def _eval(model: str | None, device: str, task: str, lengths: str, trials: int) -> dict[str, Any]:
    """Rows of `mgam eval` for one task, dense beside mgam."""
    command = [
        sys.executable,
        "-m",
        "mgam",
        "eval",
        "--tasks",
        task,
        "--lengths",
        lengths,
        "--methods",
        "mgam",
        "--trials",
        str(trials),
        "--device",
        device,
        "--json",
    ]
    command += [] if model is None else ["--model", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return {"command": " ".join(["mgam", *command[3:]]), "rows": json.loads(done.stdout)}


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
    hits = Table("task", "tokens", "method", "trials", "score", "stderr", "entries per query", title="Hits and loss")
    for cell in cells.values():
        for row in cell.get("rows", []):
            hits.add_row(
                row["task"],
                f"{row['length']:,}",
                row["method"],
                str(row["trials"]),
                f"{row['score']:.3f}",
                f"{row['stderr']:.3f}",
                f"{row['entries_per_query']:,.0f}",
            )
    console.print(hits)


if __name__ == "__main__":
    typer.run(main)

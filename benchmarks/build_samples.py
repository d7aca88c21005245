"""Seconds that building one sample takes, for every synthetic task, on one core.

    TOKENIZERS_PARALLELISM=false taskset -c 0 python benchmarks/build_samples.py --length 128k

Times are of this process's processor, so that other work on the machine does not count; the first sample reads
texts and word lists. The median and the longest of all are given. Nothing is read from the cache of samples.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from mgam.evaluation.machine import conditions
from mgam.evaluation.registry import find_tasks, parse_lengths
from mgam.evaluation.sample import Request
from mgam.evaluation.texts import TextLibrary
from mgam.evaluation.tokens import TokenCounter


def main(
    tasks: Annotated[str, typer.Option(help="Tasks or groups, with commas.")] = "synthetic",
    length: Annotated[str, typer.Option()] = "128k",
    samples: Annotated[int, typer.Option(help="Of each task.")] = 3,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer; the default model's if not given.")] = None,
    results: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Prints a table."""
    from transformers import AutoTokenizer

    from mgam.integrations.loading import locate

    counter, texts = TokenCounter(AutoTokenizer.from_pretrained(locate(model))), TextLibrary()
    found = []
    print("| task | tokens | first, s | median, s | longest, s |\n|---|---|---|---|---|")
    for task in find_tasks(tasks.split(",")):
        seconds, tokens = [], 0
        for index in range(samples):
            begun = time.process_time()
            tokens = task.sample(Request(task.name, parse_lengths(length)[0], 0, index, counter, texts)).tokens
            seconds.append(round(time.process_time() - begun, 3))
        found.append({"task": task.name, "tokens": tokens, "seconds": seconds})
        shown = " | ".join(f"{value:.2f}" for value in (seconds[0], median(seconds), max(seconds)))
        print(f"| {task.name} | {tokens:,} | {shown} |", flush=True)
    slowest = max(max(row["seconds"]) for row in found)
    print(f"\nThe slowest sample took {slowest:.2f} s.", file=sys.stderr)
    if results is not None:
        results.write_text(json.dumps({"conditions": conditions(), "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

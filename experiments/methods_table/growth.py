"""Growth of time and memory with the length of a text, for every method, beside what is claimed."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from mgam import methods
from mgam.benchmarks.methods import time_method
from mgam.evaluation.machine import conditions

ENOUGH = 20.0
"""Seconds of one pass from which on longer texts are left out."""
DECODERS = [
    "dense", "mgam", "longheads", "streaming-llm", "quest", "snapkv", "h2o", "moba", "sliding", "strided", "dilated",
    "blockwise",
]  # fmt: skip
LOOPS = ["infini-retri"]
MODULES = ["longformer", "bigbird", "linformer", "reformer", "performer", "nsa", "cca", "dga"]
"""Methods whose trainable module is timed."""


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per method and length; what is in the file already is not measured again."""
    path = options.out / "growth.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["method"], line["length"]) for line in lines}
    machine = conditions(options.device)
    known: list[str] = options.methods.split(",") if options.methods else [*DECODERS, *LOOPS, *MODULES]
    with path.open("a") as file:
        for name in known:
            for tokens in _lengths(options):
                if (name, tokens) in done:
                    continue
                try:
                    found = time_method(name, tokens, options.device, trained=name in MODULES)
                except torch.OutOfMemoryError:
                    print(f"{name}: out of memory at {tokens} tokens")
                    break
                line = {"method": name, "length": tokens, **found, "grows": methods.get(name).grows}
                file.write(json.dumps({**line, "machine": machine["device"], "commit": machine["commit"]}) + "\n")
                file.flush()
                yield line
                if min(found["seconds"]) > ENOUGH:
                    break


def _lengths(options: argparse.Namespace) -> Iterator[int]:
    tokens = options.shortest
    while tokens <= options.longest:
        yield tokens
        tokens *= 2


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log time over log length, by least squares, over the longer half of the lengths."""
    chosen = sorted(points)[len(points) // 2 :]
    if len(chosen) < 2:
        return None
    xs, ys = [math.log(length) for length, _ in chosen], [math.log(value) for _, value in chosen]
    middle = sum(xs) / len(xs)
    above = sum((x - middle) * y for x, y in zip(xs, ys, strict=True))
    return above / sum((x - middle) ** 2 for x in xs)

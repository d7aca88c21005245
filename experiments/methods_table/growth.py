"""Growth of time and memory with the length of a text, for every method, beside what is claimed."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from typing import Any

from mgam import methods
from mgam.benchmarks.methods import time_method
from mgam.evaluation.machine import conditions

DECODERS = [
    "dense", "mgam", "longheads", "streaming-llm", "quest", "snapkv", "h2o", "moba", "sliding", "strided", "dilated",
    "blockwise",
]  # fmt: skip
LOOPS = ["infini-retri"]
MODULES = ["longformer", "bigbird", "linformer", "reformer", "performer", "nsa", "cca", "dga"]
"""Methods whose trainable module is timed."""


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per length and method, shortest first; what is in the file already is not measured again.

    A method ends where its next pass would take more than `enough` seconds, and all end with the minutes.
    """
    path = options.out / "growth.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {(line["method"], line["length"]): min(line["seconds"]) for line in lines}
    machine, until = conditions(options.device), time.time() + 60 * (options.minutes or math.inf)
    known: list[str] = options.methods.split(",") if options.methods else [*DECODERS, *LOOPS, *MODULES]
    with path.open("a") as file:
        for tokens in _lengths(options):
            for name in [*known]:
                guess = _guess([seconds for (method, _), seconds in sorted(found.items()) if method == name])
                if (name, tokens) in found or guess > min(options.enough, until - time.time()):
                    continue
                try:
                    took = time_method(name, tokens, options.device, trained=name in MODULES)
                except Exception as error:  # a kernel's too: the others go on, the reason is said
                    print(f"{name}: {type(error).__name__} at {tokens} tokens: {error}")
                    known.remove(name)
                    continue
                found[name, tokens] = min(took["seconds"])
                line = {"method": name, "length": tokens, **took, "grows": methods.get(name).grows}
                file.write(json.dumps({**line, "machine": machine["device"], "commit": machine["commit"]}) + "\n")
                file.flush()
                yield line


def _guess(seconds: list[float]) -> float:
    """Seconds at the next length, twice the last, if time goes on to grow as it did; at most fourfold."""
    if len(seconds) < 2:
        return 0.0
    return seconds[-1] * min(4.0, max(2.0, seconds[-1] / seconds[-2]))


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

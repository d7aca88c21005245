"""Growth of time and memory with length: one row, a process of its own for each model (on a CPU for each point)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mgam.evaluation.machine import conditions
from mgam.nn import LearnedGranularAttention
from mgam.nn.base import Seen
from papertable.measure import Clock, peak_memory, reset_memory
from papertable.models import MODELS, Reader, kernels, loss_of
from papertable.sample import ASKED, Batch
from papertable.sizes import SIZES
from papertable.vocabulary import END, SIZE

ENOUGH_SECONDS = 40.0
"""A point that took so long is the last of its model."""
LEAST, MOST, SECONDS = 3, 7, 2.0


def measure(
    size: str,
    folder: Path,
    device: str,
    shortest: int,
    longest: int,
    models: tuple[str, ...] = MODELS,
    replayed: bool = False,
) -> Iterator[dict[str, Any]]:
    """Points that are not in the folder yet, added to it one by one; `replayed`: of steps as CUDA graphs."""
    path = _file(folder, replayed)
    lengths = [shortest << at for at in range(longest.bit_length()) if shortest << at <= longest]
    for model in models:
        while left := _left(read(folder, replayed), model, lengths):
            for line in _apart(size, model, left if device.startswith("cuda") else left[:1], device, replayed):
                folder.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                yield line


def _left(done: list[dict[str, Any]], model: str, lengths: list[int]) -> list[int]:
    """Lengths that were not measured, unless one failed or took too long."""
    own = [line for line in done if line["model"] == model]
    if any("failed" in line or line["step_ms"] > 1e3 * ENOUGH_SECONDS for line in own):
        return []
    return [length for length in lengths if length not in {line["length"] for line in own}]


def _file(folder: Path, replayed: bool) -> Path:
    return folder / ("replayed.jsonl" if replayed else "growth.jsonl")


def read(folder: Path, replayed: bool = False) -> list[dict[str, Any]]:
    """Points that were measured."""
    path = _file(folder, replayed)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _apart(size: str, model: str, lengths: list[int], device: str, replayed: bool) -> Iterator[dict[str, Any]]:
    """Points of another process, each as soon as it is there; the length at which it broke down is told as failed."""
    words = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "point", model, *map(str, lengths)]
    words += ["--size", size, "--device", device, *(["--replayed"] if replayed else [])]
    found = 0
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            for line in process.stdout or ():
                found += 1
                yield json.loads(line)
        if process.returncode and found < len(lengths):
            said.seek(0)
            last = (said.read().strip().splitlines() or [f"ended with {process.returncode}"])[-1]
            yield {"model": model, "length": lengths[found], "size": size, "failed": last, **_conditions(device)}


def point(size: str, model: str, length: int, device: str, replayed: bool = False) -> dict[str, Any]:
    """Forward pass and training step of one row of `length` tokens, and MGAM's parts, each alone.

    `replayed`: the step alone, captured once as a CUDA graph: what the device needs when it never waits for the host.
    """
    torch.manual_seed(0)
    reader = Reader(model, SIZES[size], recompute=True).to(device)
    batch = _batch(length).to(device)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()

    def forward() -> None:
        with torch.no_grad(), autocast:
            reader(batch)

    def step() -> None:
        with autocast:
            units, tokens = reader(batch)
            loss = loss_of(units, tokens, batch)
        loss.backward()
        reader.zero_grad(set_to_none=True)

    found: dict[str, Any] = {"model": model, "length": length, "size": size}
    if replayed:
        with kernels(model, device):
            found |= {f"step_{part}": value for part, value in _timed(_captured(step), device).items()}
        return {**found, **_conditions(device)}
    found["idle_bytes"] = _memory_now(device)
    with kernels(model, device):
        for name, call in (("forward", forward), ("step", step)):
            reset_memory(device)
            found |= {f"{name}_{part}": value for part, value in _timed(call, device).items()}
            found[f"{name}_peak_bytes"] = peak_memory(device)
    if model.startswith("mgam"):
        found |= _parts(reader, length, device, autocast)
    return {**found, **_conditions(device)}


def _captured(call: Callable[[], None]) -> Callable[[], None]:
    """The same work as one CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is made on first use must not be captured
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _batch(length: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, SIZE, (1, length), generator=draw)
    ends = torch.arange(ASKED + 32, length - ASKED, 32)[None]
    tokens[0, ends[0]] = END
    gold = torch.zeros_like(ends, dtype=torch.bool)
    gold[0, 0] = True
    return Batch(tokens, ends, gold, torch.tensor([[ASKED + 2, ASKED + 3]]), torch.tensor([[-1, -1]]))


@torch.no_grad()
def _parts(reader: Reader, length: int, device: str, autocast: Any) -> dict[str, Any]:
    """Pyramid (summaries of all levels, search keys) and policy (its projections, scores and choice) of all layers."""
    layer: Any = reader.layers[0]
    attention: LearnedGranularAttention = layer.attention
    states = torch.randn(1, length, attention.width, device=device)
    with autocast:
        if attention.served(states):
            calls = _fused_parts(attention, states)
            return _told({name: _timed(call, device)["ms"] * len(reader.layers) for name, call in calls.items()})
        q, new = attention._project(states, 0)
        seen = Seen(states, q, new["k"], new["v"], new)
        search = attention.pyramid(seen)[2]
        part = attention.part(0, -(-length // attention.block), length, states.device)

        def policy() -> None:
            attention.extra(states, q, 0)
            attention.choose(part, *attention.judge(part, search, seen))

        calls = {"pyramid": lambda: attention.pyramid(seen), "policy": policy}
        times = {name: _timed(call, device)["ms"] * len(reader.layers) for name, call in calls.items()}
    return _told(times)


def _fused_parts(attention: LearnedGranularAttention, states: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The same where kernels read."""
    from mgam.nn.fused.attend import Searched, covers, summaries

    plan, heads, scores = attention.plan(states.shape[1]), attention.kv_heads, attention.scores
    assert scores is not None
    keys, values = (attention.split(part(states)) for part in (attention.key, attention.value))

    def policy() -> None:
        searched = Searched(*scores.searched(states, plan.chunks, plan.levels, attention.every))
        covers(plan, searched, None, len(states), heads)

    return {"pyramid": lambda: summaries(plan, keys, values), "policy": policy}


def _told(times: dict[str, float]) -> dict[str, Any]:
    return {f"{name}_ms": round(value, 4) for name, value in times.items()}


def _timed(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Median, fastest and slowest, in milliseconds, after one call that is not counted."""
    call()
    clock, began = Clock(device), time.perf_counter()
    repeats = 0
    while repeats < LEAST or (repeats < MOST and time.perf_counter() - began < SECONDS):
        with clock:
            call()
        repeats += 1
        if time.perf_counter() - began > ENOUGH_SECONDS:
            break
    times = clock.milliseconds()
    return {
        "ms": round(statistics.median(times), 4),
        "fastest_ms": round(min(times), 4),
        "slowest_ms": round(max(times), 4),
        "repeats": repeats,
    }


def _memory_now(device: str) -> int:
    """Bytes before the first pass: weights, and on a CPU the process itself."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else peak_memory(device)


def _conditions(device: str) -> dict[str, Any]:
    found = conditions(device)
    return {"machine": found["device"], "commit": found["commit"], "threads": found["threads"], "date": found["date"]}

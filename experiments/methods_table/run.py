"""One table of all methods: `python experiments/methods_table/run.py decoders|trained|growth --out FOLDER`.

decoders: the methods that serve a trained model, by `mgam eval`'s session; what was done before is gone on from.
trained: small models from scratch on recall, copying and a needle; one line of JSON per module and task.
growth: seconds and bytes of one pass of each module from 1k tokens on; one line of JSON per module and length.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgam import nn

DECODER_METHODS = "mgam,streaming-llm,quest,longheads,snapkv,h2o,moba,sliding,strided,dilated,dyadic"
DECODER_TASKS = "needle_prose,needle_keys,variables,facts_by_id,loss_shipped"
VOCABULARY = 64

MODULES: dict[str, Callable[[int, int], nn.SelfAttention]] = {
    "full": lambda width, heads: nn.FullAttention(width, heads),
    "mgam-scored": lambda width, heads: nn.MultiGranularAttention(width, heads),
    "mgam-fixed": lambda width, heads: nn.MultiGranularAttention(width, heads, policy="fixed"),
    "sliding": lambda width, heads: nn.LocalAttention(width, heads),
    "longformer": lambda width, heads: nn.LongformerAttention(width, heads),
    "bigbird": lambda width, heads: nn.BigBirdAttention(width, heads, block=16),
    "performer": lambda width, heads: nn.PerformerAttention(width, heads),
    "reformer": lambda width, heads: nn.ReformerAttention(width, heads),
    "nsa": lambda width, heads: nn.NativeSparseAttention(
        width, heads, length=8, stride=4, select=16, blocks=4, window=32
    ),
    "moba": lambda width, heads: nn.MobaAttention(width, heads, block=16),
    "cca": lambda width, heads: nn.CoreContextAttention(width, heads, window=32),
    "dga": lambda width, heads: nn.DynamicGroupAttention(width, heads),
}


def recall(rows: int, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of key and value, then keys again: the value is to follow. -100 where nothing is asked."""
    half, pairs = VOCABULARY // 2, max(1, tokens // 4)
    keys = torch.rand(rows, half - 1, generator=draw).argsort(1)[:, : min(pairs, half - 1)]
    values = half + torch.randint(0, half, keys.shape, generator=draw)
    order = torch.rand(keys.shape, generator=draw).argsort(1)
    told = torch.stack((keys, values), 2).flatten(1)
    asked = torch.stack((keys.gather(1, order), values.gather(1, order)), 2).flatten(1)
    text = torch.cat((told, asked), 1)
    targets = torch.full_like(text, -100)
    targets[:, told.shape[1] :: 2] = text[:, told.shape[1] + 1 :: 2]
    return text, targets


def copying(rows: int, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random text, then the same again."""
    first = torch.randint(0, VOCABULARY, (rows, tokens // 2), generator=draw)
    text = torch.cat((first, first), 1)
    targets = torch.full_like(text, -100)
    targets[:, tokens // 2 : -1] = text[:, tokens // 2 + 1 :]
    return text, targets


def needle(rows: int, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """One marked token anywhere in noise; after the mark at the end it is to follow."""
    text = torch.randint(0, VOCABULARY - 1, (rows, tokens), generator=draw)
    place = torch.randint(0, tokens - 3, (rows, 1), generator=draw)
    answer = text.gather(1, place + 1)
    text.scatter_(1, place, VOCABULARY - 1)
    text[:, -1] = VOCABULARY - 1
    targets = torch.full_like(text, -100)
    targets[:, -1:] = answer
    return text, targets


TASKS = {"recall": recall, "copying": copying, "needle": needle}


def trained(options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Trains a small decoder per module, task and seed, and gives its accuracy on texts it has not seen."""
    for task, name in ((task, name) for task in TASKS for name in MODULES):
        if ("trained", name, task, options.length) in done:
            continue
        torch.manual_seed(options.seed)
        model = nn.Decoder(VOCABULARY, options.width, lambda name=name: MODULES[name](options.width, 4))
        model.to(options.device)
        steps = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
        draw, begin = torch.Generator().manual_seed(options.seed), time.perf_counter()
        for _ in range(options.steps):
            text, targets = (part.to(options.device) for part in TASKS[task](options.rows, options.length, draw))
            loss = torch.nn.functional.cross_entropy(model(text).flatten(0, 1), targets.flatten(), ignore_index=-100)
            steps.zero_grad()
            loss.backward()
            steps.step()
        with torch.no_grad():
            text, targets = (part.to(options.device) for part in TASKS[task](4 * options.rows, options.length, draw))
            right = (model(text).argmax(-1) == targets)[targets != -100].float().mean()
        seconds = round(time.perf_counter() - begin, 2)
        key = {"part": "trained", "module": name, "task": task, "length": options.length}
        yield {**key, "steps": options.steps, "accuracy": round(float(right), 4), "seconds": seconds}


def growth(options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Times one pass of every module at doubling lengths. Bytes are the device allocator's, and null on a CPU."""
    on_gpu = options.device.startswith("cuda")
    for name, make in MODULES.items():
        tokens = options.shortest
        while tokens <= options.longest:
            if ("growth", name, None, tokens) not in done:
                module = make(options.width, 4).to(options.device)
                states = torch.randn(1, tokens, options.width, device=options.device)
                found, peak = [], None
                with torch.no_grad():
                    for _ in range(3):
                        if on_gpu:
                            torch.cuda.synchronize()
                            torch.cuda.reset_peak_memory_stats()
                        begin = time.perf_counter()
                        module(states)
                        if on_gpu:
                            torch.cuda.synchronize()
                            peak = torch.cuda.max_memory_allocated()
                        found.append(round(time.perf_counter() - begin, 6))
                key = {"part": "growth", "module": name, "length": tokens}
                yield {**key, "seconds": found, "peak_bytes": peak, "device": options.device}
            tokens *= 2


def decoders(options: argparse.Namespace) -> None:
    """Runs `mgam eval`'s session; its results file makes it resumable."""
    from rich.console import Console

    from mgam.evaluation.session import Session, evaluate_session

    session = Session(
        options.tasks.split(","),
        options.lengths,
        options.methods.split(","),
        model=options.model,
        trials=options.trials,
        seed=options.seed,
        device=options.device,
        results=options.out / "decoders.jsonl",
    )
    outcome = evaluate_session(session, Console(stderr=True))
    for row in outcome.rows if outcome else ():
        print(row)


def main() -> None:
    """Reads the command line and writes one line of JSON per result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("decoders", "trained", "growth"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model")
    parser.add_argument("--tasks", default=DECODER_TASKS)
    parser.add_argument("--lengths", default="8k,32k,128k")
    parser.add_argument("--methods", default=DECODER_METHODS)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=131072)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "decoders":
        decoders(options)
        return
    path = options.out / f"{options.part}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["part"], one["module"], one.get("task"), one["length"]) for one in lines}
    with path.open("a") as file:
        for result in (trained if options.part == "trained" else growth)(options, done):
            print(json.dumps(result), file=file, flush=True)
            print(json.dumps(result))


if __name__ == "__main__":
    main()

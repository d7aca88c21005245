"""Growth of time and memory with the length of a text, for every method, beside what is claimed."""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import mgam
from mgam import methods, nn
from mgam.documents.infiniretri import retrieve
from mgam.evaluation.machine import conditions
from mgam.methods.infiniretri import Retrieval
from mgam.schedule import Schedule

WIDTH, HEADS, KV_HEADS = 512, 8, 2
CALL = 2048
GENERATED = 8
REPEATS = 3
ENOUGH = 20.0
"""Seconds of one pass from which on longer texts are left out."""
DECODERS = [
    "dense", "mgam", "longheads", "streaming-llm", "quest", "snapkv", "h2o", "moba", "sliding", "strided", "dilated",
    "blockwise",
]  # fmt: skip
LOOPS = ["infini-retri"]
MODULES = {
    "longformer": {}, "bigbird": {}, "linformer": {}, "reformer": {}, "performer": {}, "nsa": {},
    "cca": {"window": 1024}, "dga": {"block": 256},
}  # fmt: skip
"""Methods whose trainable module is timed, with settings other than its defaults."""


class Letters:
    """A tokenizer of single letters."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}


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
                    found = _of(name, tokens, options)
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


def _of(name: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    if name in MODULES:
        return _of_a_module(name, tokens, options)
    model = _decoder(options)
    if name in LOOPS:
        text = ("The number of the box is seven. " * (tokens // 32 + 1))[:tokens]
        dials = Retrieval(window=512, budget=512)
        return {"form": "loop", **_timed(lambda: retrieve(model, Letters(), text, "Which box?", dials), options)}
    if name != "dense":
        mgam.apply(model, name, dense_until=0)
    return {"form": "decoder", **_of_a_decoder(model, tokens, options)}


def _decoder(options: argparse.Namespace) -> Any:
    """One layer, of which attention is all but the whole cost."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=8192, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    return LlamaForCausalLM(config).to(options.device, dtype).eval()


@torch.no_grad()
def _of_a_decoder(model: Any, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of reading a text in calls of 2,048 tokens and of one token after it; bytes at most, and kept."""
    ids = torch.randint(2, 64, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(options.device)
    kept: list[Any] = []
    applied = getattr(model, "_mgam_applied", None)

    def read() -> None:
        kept.clear()
        if applied is None:
            kept.append(DynamicCache(config=model.config))
        else:
            block, asked = applied.settings.block, applied.settings.question_block
            schedule = Schedule.reading(tokens - 32, 32, block=block, question_block=asked, lookahead="none")
            kept.append(mgam.PyramidCache(model, [schedule]))
        decoder = model.get_decoder()
        for first in range(0, tokens, CALL):
            decoder(input_ids=ids[:, first : first + CALL], past_key_values=kept[0], use_cache=True)

    found = _timed(read, options)
    before = _held(options)
    _step(model, ids, kept[0], 2)  # the first token of an evicting method forgets; later ones are as all that follow
    _wait(options)
    begun = time.perf_counter()
    _step(model, ids, kept[0], GENERATED)
    _wait(options)
    found["token_seconds"] = round((time.perf_counter() - begun) / GENERATED, 6)
    if before is not None:
        gc.collect()
        held = _held(options)
        kept.clear()
        gc.collect()
        empty = _held(options)
        assert held is not None
        assert empty is not None
        found["kept_bytes"] = held - empty
    return found


def _step(model: Any, ids: torch.Tensor, cache: Any, count: int) -> None:
    for place in range(count):
        model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)


def _of_a_module(name: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of one pass over whole states."""
    kind = getattr(nn, methods.get(name).module)
    causal = kind.CAUSAL
    own: dict[str, Any] = dict(MODULES[name])
    own |= {"longest": tokens} if name == "linformer" else {}
    torch.manual_seed(0)
    heads = {} if name == "reformer" else {"kv_heads": KV_HEADS}
    module = kind(WIDTH, HEADS, causal=causal, **heads, **own).to(options.device)
    states = torch.randn(1, tokens, WIDTH, device=options.device)
    with torch.no_grad():
        return {"form": "module", "causal": causal, **_timed(lambda: module(states), options)}


def _timed(call: Callable[[], Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of some calls after a first one, and the allocator's highest mark above what was held before."""
    seconds, peak = [], None
    for number in range(REPEATS + 1):
        gc.collect()
        _wait(options)
        held = _held(options)
        if held is not None:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        call()
        _wait(options)
        took = time.perf_counter() - begun
        if held is not None:
            peak = torch.cuda.max_memory_allocated() - held
        if number or took > 2:
            seconds.append(round(took, 6))
        if took > 2:
            break
    return {"seconds": seconds, "peak_bytes": peak}


def _held(options: argparse.Namespace) -> int | None:
    return torch.cuda.memory_allocated() if options.device.startswith("cuda") else None


def _wait(options: argparse.Namespace) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Slope of log time over log length, by least squares, over the longer half of the lengths."""
    chosen = sorted(points)[len(points) // 2 :]
    if len(chosen) < 2:
        return None
    xs, ys = [math.log(length) for length, _ in chosen], [math.log(value) for _, value in chosen]
    middle = sum(xs) / len(xs)
    above = sum((x - middle) * y for x, y in zip(xs, ys, strict=True))
    return above / sum((x - middle) ** 2 for x in xs)

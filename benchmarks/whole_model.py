"""Whole models of random weights: time to the first token and per generated token, multi-granular beside dense.

    python benchmarks/whole_model.py --shape smollm2 --lengths 8192,32768,131072 --out whole.json
    python benchmarks/whole_model.py --shape 8b --lengths 131072 --repeats 1

Ours is read in calls as long as `mgam ask` makes them; dense in one call, where its kernel needs no mask, and in calls
of 2,048 tokens (not with `--dense-calls one`). A first reading of part of the text is left out: it compiles kernels.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import mgam
from mgam.evaluation.machine import conditions
from mgam.integrations.transformers import PyramidCache
from mgam.integrations.transformers.call_size import LEAST, call_size
from mgam.schedule import Schedule

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 49152, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

WARM = 49152
"""Tokens that are read before anything is timed: calls of every kind, so that all kernels are there."""


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens, with commas.")] = "8192,32768,131072",
    batches: Annotated[str, typer.Option(help="Rows, with commas.")] = "1",
    repeats: Annotated[int, typer.Option(help="Readings that are timed.")] = 2,
    dense_repeats: Annotated[int | None, typer.Option(help="The same for dense; as many as ours if not given.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens generated and timed.")] = 16,
    settings: Annotated[str, typer.Option(help="Settings of ours as name=number, with commas.")] = "",
    methods: Annotated[str, typer.Option(help="mgam, dense or both, with a comma.")] = "mgam,dense",
    dense_calls: Annotated[str, typer.Option(help="one, or both: calls of 2,048 tokens too.")] = "both",
    device: Annotated[str, typer.Option()] = "cuda",
    out: Annotated[Path | None, typer.Option(help="File of results.")] = None,
) -> None:
    """Measures and prints."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()
        torch.set_default_dtype(torch.float32)
    given = {name: int(number) for name, _, number in (pair.partition("=") for pair in settings.split(",") if pair)}
    rows: list[dict[str, Any]] = []
    for method in methods.split(","):
        if method == "mgam":
            mgam.apply(model, **given)
        else:
            mgam.remove(model)
        often = dense_repeats if method == "dense" and dense_repeats is not None else repeats
        for tokens in map(int, lengths.split(",")):
            for batch in map(int, batches.split(",")):
                sizes = [call_size(model, batch)]
                if method == "dense":
                    sizes = [tokens, LEAST] if dense_calls == "both" else [tokens]
                for size in sizes:
                    row = {"method": method, "shape": shape, "tokens": tokens, "batch": batch, "call": size}
                    try:
                        row |= timed(model, method, tokens, batch, size, often, steps)
                    except torch.OutOfMemoryError as error:
                        row |= {"refused": str(error).splitlines()[0][:120]}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    if out is not None:
                        result = {"rows": rows, "settings": given, "conditions": conditions(device)}
                        out.write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def timed(
    model: Any, method: str, tokens: int, batch: int, size: int, repeats: int, steps: int
) -> dict[str, float | list[float]]:
    """Seconds of reading up to the first token's logits, and of the tokens after it."""
    device = model.device
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    firsts: list[float] = []
    later: list[float] = []
    for length in (min(tokens, WARM), *[tokens] * repeats):
        cache: Any = DynamicCache(config=model.config)
        if method == "mgam":
            cache = PyramidCache(model, [Schedule.reading(length - 32, 32)] * batch, reserve=length + steps + 32)
        began = now(device)
        for first in range(0, length, size):
            out = forward(model, ids[:, first : min(first + size, length)], first, cache)
        firsts.append(now(device) - began)
        later = []
        for step in range(steps):
            began = now(device)
            out = forward(model, out.logits[:, -1:].argmax(-1), length + step, cache)
            later.append(now(device) - began)
        del cache, out
    later = later[min(3, steps - 1) :]  # a call of the first tokens is captured
    found: dict[str, float | list[float]] = {
        "seconds_to_first_token": statistics.median(firsts[1:]),
        "each": [round(one, 4) for one in firsts[1:]],
        "milliseconds_a_token": 1000 * statistics.median(later),
        "spread_ms": [round(1000 * min(later), 2), round(1000 * max(later), 2)],
    }
    if device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def forward(model: Any, ids: torch.Tensor, first: int, cache: Any) -> Any:
    """One call; logits of its last token only."""
    places = torch.arange(first, first + ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    return model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)


def now(device: torch.device) -> float:
    """The clock, after all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)

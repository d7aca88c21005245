"""How much of full attention a cheaper search keeps, beside the flat search over keys of four tokens.

    python benchmarks/search_recall.py --tokens 32768 --out recall.json

The model reads real prose densely. In every layer some blocks of 128 queries and some single queries choose what they
would open, by each search in turn; the share of full attention that falls on sink, opened chunks and window is what
that search keeps. Figures are by layer, averaged over KV heads, queries and texts, and relative to the flat search.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from mgam.cover import window_start
from mgam.evaluation.machine import conditions
from mgam.evaluation.texts import TextLibrary
from mgam.integrations.loading import load
from mgam.levels import Levels
from mgam.policies import Scored
from mgam.policies.base import Voters
from mgam.policies.compact import Compact
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks
from mgam.training.teacher import Seen, chunk_masses, watching

BLOCK = 128
BASIS = 8192
"""Tokens that give the basis of compact keys; nothing before them is measured."""
CHEAPER = "every=2,search_dims=32,search_bits=8,every=2:search_bits=8,every=2:search_dims=32:search_bits=8"
Kept = dict[tuple[str, str, int], list[list[float]]]
"""(queries, search, budget): by layer, one figure a text."""


def searches(labels: list[str], budget: int, window: int, dim: int) -> dict[str, Scored]:
    """The flat search, and those that labels such as `every=2:search_dims=32:search_bits=8` name.

    Raises:
        typer.BadParameter: a part that is none of these three.
    """
    found = {"flat": Scored(budget, window)}
    for label in labels:
        parts = dict(part.partition("=")[::2] for part in label.split(":"))
        if not parts.keys() <= {"every", "search_dims", "search_bits"} or not all(map(str.isdigit, parts.values())):
            raise typer.BadParameter(
                f"{label!r}: a search is named by every=, search_dims= and search_bits=, colons between"
            )
        dims, bits = int(parts.get("search_dims", dim)), int(parts.get("search_bits", 16))
        short = None if (dims, bits) == (dim, 16) else Compact(dims, 8 if bits == 8 else 16, BASIS)
        found[label] = Scored(budget, window, every=int(parts.get("every", 1)), compact=short)
    return found


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 32_768,
    texts: Annotated[int, typer.Option(help="Texts.")] = 2,
    blocks: Annotated[int, typer.Option(help="Blocks of each text, and single queries.")] = 16,
    budgets: Annotated[str, typer.Option(help="Tokens opened, with commas.")] = "1024,2048",
    window: Annotated[int, typer.Option(help="Tokens of the window.")] = 512,
    cheaper: Annotated[str, typer.Option(help="Searches to set beside the flat one, commas between.")] = CHEAPER,
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")] = None,
    prose: Annotated[str | None, typer.Option(help="Text source; its test split is read.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    out: Annotated[Path | None, typer.Option(help="File of results.")] = None,
) -> None:
    """Measures and prints."""
    loaded = load(model, device=device)
    began, kept = time.perf_counter(), Kept()
    for number in range(texts):
        ids = read(loaded.tokenizer, tokens, prose, number).to(loaded.model.device)
        measure(loaded.model, ids, blocks, [int(one) for one in budgets.split(",")], window, cheaper.split(","), kept)
        result = summary(kept) | {
            "tokens": tokens, "texts": number + 1, "blocks_per_text": blocks, "window": window,
            "model": Path(model or "default").stem, "seconds": round(time.perf_counter() - began, 1),
            "conditions": conditions(str(loaded.model.device)),
        }  # fmt: skip
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{number + 1} of {texts} texts, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    for row in result["searches"]:
        print(row["queries"], row["budget"], row["search"], f"kept {row['kept']:.4f}", f"of flat {row['of_flat']:.4f}")


def read(tokenizer: Any, tokens: int, prose: str | None, seed: int) -> Tensor:
    """Tokens (1, T) of running prose."""
    ids: list[int] = []
    for sentence in TextLibrary(prose=prose).prose(random.Random(seed)):
        ids += tokenizer(sentence, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])[None]
    raise AssertionError("prose has no end")


@torch.no_grad()
def measure(
    model: Any, ids: Tensor, count: int, budgets: list[int], window: int, cheaper: list[str], kept: Kept
) -> None:
    """Adds what one text shows."""
    tokens = ids.shape[1]
    last = tokens // BLOCK - 1
    first = min(-(-BASIS // BLOCK), last)
    places = torch.linspace(first, last, count).long().unique() * BLOCK
    levels = Levels()

    def visit(seen: Seen) -> None:
        pyramid = Pyramid.of(seen.keys, seen.keys, levels)
        for kind, size in (("blocks of 128", BLOCK), ("single queries", 1)):
            start = places + (BLOCK - size)
            cut = torch.stack([seen.queries[0, :, at : at + size] for at in start.tolist()])
            voters = Voters(cut, torch.ones(len(start), size, dtype=torch.bool, device=cut.device))
            zero = torch.zeros_like(start)
            asked = Blocks(zero, start, zero + size, start, start, start + size, size, size)
            masses = [
                chunk_masses(seen, torch.arange(at, at + size, device=cut.device)[None], levels.chunk)[0]
                for at in start.tolist()
            ]
            for budget in budgets:
                for name, policy in searches(cheaper, budget, window, seen.queries.shape[3]).items():
                    found = policy.choose(voters, asked, pyramid, levels).opened
                    share = [
                        _share(mass, opened, int(begin) // levels.chunk)
                        for mass, opened, begin in zip(
                            masses, found, window_start(start, window, levels).tolist(), strict=True
                        )
                    ]
                    layers = kept.setdefault((kind, name, budget), [])
                    while len(layers) <= seen.layer:
                        layers.append([])
                    layers[seen.layer].append(sum(share) / len(share))

    with watching(model, visit):
        model.get_decoder()(input_ids=ids, use_cache=False)


def _share(mass: Tensor, opened: Tensor, window: int) -> float:
    """Part of attention (H, G, n, C) on the opened chunks (H, K) and on all from `window` on."""
    some = mass.new_zeros(mass.shape[0], mass.shape[-1] + 1)
    some.scatter_(1, torch.where(opened < 0, mass.shape[-1], opened), 1.0)
    some = some[:, :-1]
    some[:, window:] = 1.0
    return float((mass * some[:, None, None]).sum(-1).mean())


def summary(kept: Kept) -> dict[str, Any]:
    """By search: what it keeps, by layer and on average, and the same relative to the flat search."""
    rows: list[dict[str, Any]] = []
    for (kind, name, budget), layers in kept.items():
        mine = [sum(one) / len(one) for one in layers]
        flat = [sum(one) / len(one) for one in kept[kind, "flat", budget]]
        of_flat = [a / b for a, b in zip(mine, flat, strict=True)]
        row: dict[str, Any] = {"queries": kind, "search": name, "budget": budget}
        row |= {"kept": sum(mine) / len(mine), "of_flat": sum(of_flat) / len(of_flat)}
        row |= {"worst_layer_of_flat": min(of_flat)}
        row |= {"kept_by_layer": [round(one, 4) for one in mine]}
        row |= {"of_flat_by_layer": [round(one, 4) for one in of_flat]}
        rows.append(row)
    return {"searches": rows}


if __name__ == "__main__":
    typer.run(main)

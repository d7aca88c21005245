"""Fetching from pinned main memory for one token, without a model: chosen pages against whole layers.

Run by `documents.py fetch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mgam.documents.pool import Pool
from mgam.documents.store.layout import Shape
from mgam.documents.tiers import HostPages
from mgam.levels import Levels


def pages_against_layers(tokens: int, layers: int, held: int, opened: int, window: int, steps: int) -> dict[str, Any]:
    """Seconds of a token by pages that were chosen, and by moving whole layers; needs CUDA."""
    heads, dim, levels = 8, 128, Levels()
    shape = Shape(held, 32, heads, dim, "bfloat16", levels, 0, 16)
    chunks, device = tokens // levels.chunk, torch.device("cuda")
    host = HostPages([
        torch.empty(chunks, heads, shape.page_bytes, dtype=torch.uint8, pin_memory=True).fill_(layer)
        for layer in range(held)
    ])  # fmt: skip
    per_layer = heads * (opened + window)
    pool = Pool(shape, 2 * per_layer, device)  # so small that nothing is found again
    host.serve(pool)
    pool.reserve(chunks)
    rng = np.random.default_rng(0)

    def token() -> None:
        for layer in range(layers):
            chosen = np.stack([rng.choice(chunks, opened + window, replace=False) for _ in range(heads)]).reshape(-1)
            slots = pool.slots_of(layer % held, np.repeat(np.arange(heads), opened + window), chosen)
            pool.keys.index_select(0, slots)
            pool.values.index_select(0, slots)

    def whole() -> None:
        for layer in range(layers):
            host.layers[layer % held].to(device, non_blocking=True)

    def seconds(what: Callable[[], None], count: int) -> float:
        what()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            what()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    chosen, moved = seconds(token, steps), seconds(whole, 2)
    return {
        "tokens": tokens, "layers": layers, "layers_held": held, "pages_a_layer": per_layer,
        "seconds_a_token_chosen_pages": round(chosen, 4), "seconds_a_token_whole_layers": round(moved, 4),
        "times_faster": round(moved / chosen, 1), "found_in_pool": 1 - pool.counts.fetched / pool.counts.asked,
    }  # fmt: skip

"""What a chunk must be worth so that a share of all attention is read as tokens: measured on texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mgam.cover import windows
from mgam.policies.learned import Learned, openable
from mgam.pyramid import Pyramid
from mgam.training.lessons import Sampling
from mgam.training.measure import spread, voters_of
from mgam.training.network import SearchNetwork
from mgam.training.teacher import Seen, chunk_masses, watching

TEXTS = 8
BLOCKS = 8
"""Query blocks of each text whose attention is weighed."""
MARKS = tuple(10 ** (-4 + step / 8) for step in range(29))
"""Candidates, rising: from a ten thousandth to almost a third of all attention."""


@torch.no_grad()
def measure_marks(
    model: Any, network: SearchNetwork, texts: Iterable[Tensor], sampling: Sampling
) -> tuple[tuple[float, float], ...]:
    """Shares of all attention that are read with each mark, rising, and the marks, falling; texts are (T,).

    The share is that of full attention, summed over blocks, heads and layers: what is near, the sink and what is opened
    with no other limit. Blocks are decided by the queries before them.
    """
    missed, whole = [0.0] * len(MARKS), 0.0
    levels, block = sampling.levels, sampling.block

    def visit(seen: Seen) -> None:
        nonlocal whole
        device, heads = seen.keys.device, seen.keys.shape[1]
        blocks = spread(seen.queries.shape[2], block, "none", sampling.window + 8 * levels.chunk, BLOCKS)
        places = (blocks.start[:, None] + torch.arange(block)).flatten().to(device)
        mass = chunk_masses(seen, places[None], levels.chunk)[0].sum(1).unflatten(1, (len(blocks), block)).sum(2)
        chunks = int(blocks.decide.max()) // levels.chunk
        allowed = openable(windows(blocks, sampling.window, levels, device)[1], chunks, levels)[:, None]
        allowed = allowed.expand(-1, heads, -1)
        pyramid = Pyramid.of(seen.keys, seen.keys, levels)
        weights = network.layer(seen.layer).weights("marks")
        for number, mark in enumerate(MARKS):
            policy = Learned(weights, chunks * levels.chunk, sampling.window, mark=mark)
            if not number:
                shares, wherever = policy.shares(voters_of(seen.queries, blocks), blocks, pyramid, levels, chunks)
            closed = allowed & ~policy.open(shares, wherever, allowed, chunks)
            missed[number] += float((mass.transpose(0, 1)[..., :chunks] * closed).sum())
        whole += float(mass.sum())

    for ids in texts:
        with watching(model, visit):
            model.get_decoder()(input_ids=ids[None].to(model.device), use_cache=False)
    found: list[tuple[float, float]] = []
    for mark, lost in zip(reversed(MARKS), reversed(missed), strict=True):
        share = round(1 - lost / whole, 5)
        if not found or share > found[-1][0]:
            found.append((share, mark))
    return tuple(found)

"""How much of full attention's mass a policy keeps: by layer, beside the oracle and the search of equal cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from mgam.cover import window_start
from mgam.levels import Levels
from mgam.policies import Policy, Scored, Voters
from mgam.policies.compact import Compact
from mgam.policies.learned import FEWEST, Learned
from mgam.policies.learned_search import SearchWeights
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Lookahead, Schedule
from mgam.training.teacher import Seen, chunk_masses, watching

MakePolicy = Callable[[int, float], Policy]
"""Layer and attention scale -> the policy that reads there."""


@dataclass(frozen=True)
class Kept:
    """Share of the mass outside sink and window that is opened: by policy, layer and text."""

    shares: dict[str, dict[int, list[float]]]
    opened: dict[str, float]
    """Tokens opened on average."""

    def mean(self, name: str) -> float:
        """Over layers and texts."""
        return fmean(fmean(texts) for texts in self.shares[name].values())

    def layer(self, name: str, layer: int) -> tuple[float, float]:
        """Mean over texts and its standard error."""
        texts = self.shares[name][layer]
        return fmean(texts), stdev(texts) / len(texts) ** 0.5 if len(texts) > 1 else 0.0


def equal_search(learned: Learned, group: int, block: int) -> dict[str, Any]:
    """The stride and dimensions with which the training-free search costs what a learned one does, or a little more."""
    votes = min(block, max(FEWEST, -(-block // learned.thin)))
    cost = (learned.weights.slots + group) * learned.weights.width * votes
    dims = max(16, learned.weights.width // 16 * 16)
    return {"every": max(1, group * dims * block // cost), "compact": Compact(dims=dims, bits=16, calibrate=1024)}


@torch.no_grad()
def mass_kept(
    model: Any,
    texts: Sequence[Tensor],
    policies: Mapping[str, MakePolicy],
    levels: Levels,
    *,
    budget: int,
    window: int = 512,
    block: int = 128,
    lookahead: Lookahead = "block",
    most_blocks: int = 32,
) -> Kept:
    """Lets policies choose for texts (T,) on what the frozen model computes there, and weighs what they open.

    `oracle` stands beside them: the chunks with the most mass.
    """
    shares: dict[str, dict[int, list[float]]] = {name: {} for name in (*policies, "oracle")}
    opened: dict[str, list[float]] = {name: [] for name in policies}

    def visit(seen: Seen) -> None:
        blocks = spread(seen.queries.shape[2], block, lookahead, window + 8 * levels.chunk, most_blocks)
        device = seen.queries.device
        places = (blocks.start[:, None] + torch.arange(block)).flatten().to(device)
        found = [chunk_masses(seen, part[None], levels.chunk)[0].sum(1) for part in places.split(4 * block)]
        mass = torch.cat(found, 1).unflatten(1, (len(blocks), block)).sum(2).transpose(0, 1)  # (N, H, C)
        start = window_start(blocks.decide, window, levels).to(device)
        number = torch.arange(mass.shape[-1], device=device)
        far = (number > 0) & ((number + 1) * levels.chunk <= start[:, None])
        mass = mass * far[:, None]
        total = float(mass.sum())
        best = float(mass.topk(min(budget // levels.chunk, mass.shape[-1]), -1).values.sum())
        shares["oracle"].setdefault(seen.layer, []).append(best / total)
        pyramid = Pyramid.of(seen.keys, seen.keys, levels)
        for name, make in policies.items():
            policy = make(seen.layer, seen.scale)
            cover = policy.choose(voters_of(seen.queries, blocks), blocks, pyramid, levels)
            index = cover.opened
            kept = float((mass.gather(-1, index.clamp_min(0)) * (index >= 0)).sum())
            shares[name].setdefault(seen.layer, []).append(kept / total)
            opened[name].append(float((index > 0).sum(-1).float().mean()) * levels.chunk)

    for ids in texts:
        with watching(model, visit):
            model.get_decoder()(input_ids=ids[None].to(model.device), use_cache=False)
    return Kept(shares, {name: fmean(counts) for name, counts in opened.items()})


def spread(tokens: int, block: int, lookahead: Lookahead, first: int, most: int) -> Blocks:
    """Whole blocks of a text, evenly spread."""
    pieces = [
        piece for piece in Schedule.uniform(block, lookahead).pieces(0, tokens // block * block) if piece.start >= first
    ]
    step = max(1, -(-len(pieces) // most))
    return Blocks.of([(0, piece) for piece in pieces[::step]])


def voters_of(queries: Tensor, blocks: Blocks) -> Voters:
    """The voters of blocks of one text, of its queries (1, H*G, T, D)."""
    number = torch.arange(blocks.votes)
    count = (blocks.vote_to - blocks.vote_from)[:, None]
    place = (blocks.vote_from[:, None] + torch.minimum(number, count - 1)).to(queries.device)
    return Voters(queries[0][:, place].transpose(0, 1), (number < count).to(queries.device))


def peers(layers: Mapping[int, Any], group: int, levels: Levels, budget: int, block: int) -> dict[str, MakePolicy]:
    """The learned policy with its usual, no and all content; the training-free search at its cost and at its own."""
    first = Learned(next(iter(layers.values())), budget)
    equal = equal_search(first, group, block)
    return {
        "learned": lambda layer, scale: Learned(layers[layer], budget),
        "scored, equal cost": lambda layer, scale: Scored(budget, scale=scale, **equal),
        "scored": lambda layer, scale: Scored(budget, scale=scale),
        "learned, content 0": lambda layer, scale: Learned(layers[layer], budget, content=0.0),
        "learned, content 1": lambda layer, scale: Learned(layers[layer], budget, content=1.0),
        "distance alone": lambda layer, scale: Learned(blind(layers[layer]), budget, content=0.0),
    }


def blind(weights: SearchWeights) -> SearchWeights:
    """The same search without what queries and keys say: distance is all that it knows."""
    nothing: dict[str, Any] = {
        name: torch.zeros_like(getattr(weights, name)) for name in ("query", "query_bias", "key", "key_bias")
    }
    return replace(weights, name=f"{weights.name}.blind", **nothing)

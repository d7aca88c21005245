"""Which part of its budget each KV head needs for single facts far back: measured on texts with questions.

Few heads look facts up. Those that do need what the search finds whatever the distance; the others lose by it much of
the attention that they would get. Both is counted for several parts, and each head takes the one that serves best.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mgam.cover import windows
from mgam.policies.base import Voters
from mgam.policies.learned import Learned, openable
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Piece
from mgam.training.lessons import Sampling
from mgam.training.lookups import Asked, Lookup
from mgam.training.measure import spread, voters_of
from mgam.training.network import SearchNetwork
from mgam.training.teacher import Seen, chunk_masses, watching

CANDIDATES = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXTS = 16
QUESTIONS = 16
"""Questions about each text."""
BLOCKS = 8
"""Query blocks of each text whose attention is weighed."""
ANSWERS = 4
"""First tokens of an answer that are looked at."""
QUESTION_BLOCK = 32
DEEP = 4
"""A fact counts where it is among the first of so many parts of what is opened: texts in use are longer."""
FACTS = 1.0
"""What finding a fact counts, beside the share of attention that is kept."""


@dataclass
class Counts:
    """What a layer's heads find and keep, by candidate: all (H, K), and how much there was."""

    questions: Tensor
    answers: Tensor
    kept: Tensor
    asked: float = 0.0
    answered: float = 0.0
    mass: Tensor | None = None
    """(H,)"""

    @classmethod
    def none(cls, heads: int, device: torch.device) -> Counts:
        """Nothing yet."""
        empty = torch.zeros(heads, len(CANDIDATES), device=device)
        return cls(empty, empty, empty)

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Shares of facts opened for questions and for answers, and of mass kept."""
        assert self.mass is not None
        kept = self.kept / self.mass[:, None].clamp_min(1e-9)
        return self.questions / max(1.0, self.asked), self.answers / max(1.0, self.answered), kept

    def best(self) -> Tensor:
        """The candidate of each head (H,); of equal ones the lower."""
        questions, answers, kept = self.found()
        value = kept + FACTS * (questions + answers) / 2
        return torch.tensor(CANDIDATES, device=value.device)[value.argmax(-1)]


@torch.no_grad()
def fit_content(
    model: Any, network: SearchNetwork, texts: Iterable[Lookup], sampling: Sampling, budget: int = 1024
) -> dict[str, Any]:
    """Sets `content` of every layer's search, and returns what was counted; texts without facts change nothing.

    `texts` are read by the model's full attention, so they are at most as long as its trained window.
    """
    counts: dict[int, Counts] = {}
    policies = {
        int(name): Learned(network.layer(int(name)).weights("content"), budget, sampling.window)
        for name in network.layers
    }
    for text in texts:

        def visit(seen: Seen, text: Lookup = text) -> None:
            heads, device = seen.keys.shape[1], seen.keys.device
            there = counts.setdefault(seen.layer, Counts.none(heads, device))
            pyramid = Pyramid.of(seen.keys, seen.keys, sampling.levels)
            _count_kept(there, policies[seen.layer], seen, pyramid, sampling)
            _count_facts(there, policies[seen.layer], seen, pyramid, sampling, text.asked)

        with watching(model, visit):
            model.get_decoder()(input_ids=text.ids[None].to(model.device), use_cache=False)
    told = {}
    for layer, there in counts.items():
        if not there.asked or not there.answered:
            continue
        best = there.best()
        network.layer(layer).content.copy_(best)
        parts = zip(("questions", "answers", "kept"), there.found(), strict=True)
        table = {name: [[round(one, 4) for one in row] for row in part.tolist()] for name, part in parts}
        told[str(layer)] = {"content": best.tolist(), **table}
    return {"candidates": CANDIDATES, "layers": told} if told else {}


def _count_kept(there: Counts, policy: Learned, seen: Seen, pyramid: Pyramid, sampling: Sampling) -> None:
    """Adds the mass outside sink and window that each candidate keeps, in blocks that those before decide."""
    levels, block = sampling.levels, sampling.block
    blocks = spread(seen.queries.shape[2], block, "none", sampling.window + 8 * levels.chunk, BLOCKS)
    places = (blocks.start[:, None] + torch.arange(block)).flatten().to(seen.keys.device)
    mass = chunk_masses(seen, places[None], levels.chunk)[0].sum(1).unflatten(1, (len(blocks), block)).sum(2)
    ways, allowed = _ways(policy, voters_of(seen.queries, blocks), blocks, pyramid, sampling, 1)
    mass = mass.transpose(0, 1)[..., : allowed.shape[-1]] * allowed  # (N, H, C)
    there.kept = there.kept + torch.stack([(mass * opened).sum((0, 2)) for opened in ways], -1)
    total = mass.sum((0, 2))
    there.mass = total if there.mass is None else there.mass + total


def _count_facts(
    there: Counts, policy: Learned, seen: Seen, pyramid: Pyramid, sampling: Sampling, asked: Iterable[Asked]
) -> None:
    """Adds how often each candidate opens the chunk that holds an answer."""
    chunk = sampling.levels.chunk
    for kind in ("questions", "answers"):
        pieces, evidence = [], []
        for one in asked:
            first, last = one.evidence[0] // chunk, (one.evidence[1] - 1) // chunk
            for low, high in _voting(one, kind):
                if first >= 1 and (last + 1) * chunk <= low + 1 - sampling.window:
                    pieces.append((0, Piece(low, high, low, low, high, False)))
                    evidence.append((first, last))
        if not pieces:
            continue
        blocks = Blocks.of(pieces)
        ways, allowed = _ways(policy, voters_of(seen.queries, blocks), blocks, pyramid, sampling, DEEP)
        number, edge = torch.arange(allowed.shape[-1]), torch.tensor(evidence)
        right = ((number >= edge[:, :1]) & (number <= edge[:, 1:])).to(allowed.device)[:, None]
        hits = torch.stack([(opened & right).any(-1).sum(0) for opened in ways], -1)
        setattr(there, kind, getattr(there, kind) + hits)
        if kind == "questions":
            there.asked += len(pieces)
        else:
            there.answered += len(pieces)


def _voting(one: Asked, kind: str) -> list[tuple[int, int]]:
    """Queries that decide together: the end of a question, or each token before one of an answer."""
    begin, end = one.answer
    if kind == "questions":
        return [(max(one.question[0], begin - QUESTION_BLOCK), begin)]
    return [(place, place + 1) for place in range(begin - 1, min(end - 1, begin - 1 + ANSWERS))]


def _ways(
    policy: Learned, voters: Voters, blocks: Blocks, pyramid: Pyramid, sampling: Sampling, deep: int
) -> tuple[list[Tensor], Tensor]:
    """What each candidate opens (N, H, C) with 1 / deep of the budget, and what it may open."""
    levels, device = sampling.levels, voters.queries.device
    start = windows(blocks, policy.window, levels, device)[1]
    chunks = int(blocks.decide.max()) // levels.chunk
    allowed = openable(start, chunks, levels)[:, None].expand(-1, pyramid.keys[0].shape[1], -1)
    shares, wherever = policy.shares(voters, blocks, pyramid, levels, chunks)
    most = max(1, policy.budget // levels.chunk // deep)
    return [replace(policy, content=one).open(shares, wherever, allowed, most) for one in CANDIDATES], allowed

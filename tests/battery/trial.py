"""One arrangement of the battery: a case, a backend, positions and who decides; and how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mgam.attend.dispatch import BACKENDS
from mgam.cover import Cover
from mgam.engine import Reading, history, read
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies import Policy, Voters
from mgam.positions import Positions, Rotary
from mgam.pyramid import Pyramid
from mgam.record import Record
from mgam.schedule import Blocks, Lookahead, Schedule

from .cases import Case
from .oracle import THETA

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, GROUP, DIM = 2, 2, 64 if DEVICE == "cuda" else 16  # the kernels for devices serve wide heads only
ROTATED = DIM // 2
SCALE = DIM**-0.5
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

States = tuple[Tensor, Tensor, Tensor]
Chosen = list[tuple[Blocks, Cover]]


class Spy:
    """A policy that keeps the covers it chose."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.chosen: Chosen = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        cover = self.policy.choose(voters, blocks, pyramid, levels)
        self.chosen.append((blocks, cover))
        return cover


@dataclass
class Frozen:
    """Covers that were chosen before, handed out again by where the blocks stand."""

    policy: Policy
    kept: dict[tuple[int, ...], Cover]
    votes = False

    @classmethod
    def of(cls, trial: Trial, states: States, *args: Any, **options: Any) -> Frozen:
        """What a trial chooses for a text."""
        chosen = trial.covers(states, *args, **options)[1]
        return cls(trial.reading().policy, {tuple(blocks.start.tolist()): cover for blocks, cover in chosen})

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        return self.kept[tuple(blocks.start.tolist())]

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        return self.policy.read_at_most(tokens, levels)


@dataclass(frozen=True)
class Trial:
    """What a test of the battery runs."""

    case: Case
    backend: str | None = "torch"
    positions: str = "absolute"
    lookahead: Lookahead = "none"
    dtype: torch.dtype = torch.float64
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the case's."""

    @property
    def levels(self) -> Levels:
        return self.case.with_settings(**self.changes).pyramid_levels

    @property
    def tolerance(self) -> dict[str, float]:
        return {"atol": TOLERANCE[self.dtype], "rtol": TOLERANCE[self.dtype]}

    @property
    def rotated(self) -> int:
        """Dimensions that the library rotates by rank."""
        return ROTATED if self.positions == "granular" else 0

    def states(self, tokens: int, rows: int = 1, seed: int = 0) -> States:
        """Fresh random queries (B, Hq, T, D), keys and values (B, H, T, D)."""
        rng = torch.Generator().manual_seed(1000 * seed + tokens)
        shapes = [(rows, HEADS * GROUP, tokens, DIM), (rows, HEADS, tokens, DIM), (rows, HEADS, tokens, DIM)]
        queries, keys, values = (
            torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, self.dtype) for shape in shapes
        )
        return 2 * queries, keys, values

    def schedule(self, document: int = 50, question: int = 11) -> Schedule:
        """A document, a question and then generated tokens; uniform blocks when there is neither."""
        block = self.case.with_settings().block
        if not document + question:
            return Schedule.uniform(block, self.lookahead)
        return Schedule.reading(document, question, block=block, question_block=5, lookahead=self.lookahead)

    def reading(self, dense_until: int = 0, policy: Policy | None = None) -> Reading:
        """How to read; a window never spans more than 64 tokens here unless all is read."""
        positions = Positions()
        if self.positions == "granular":
            positions = Positions.granular(Rotary.plain(ROTATED, limit=512, theta=THETA), window=64)
        policy = self.case.policy(SCALE, **self.changes) if policy is None else policy
        return Reading(policy, self.levels, positions, dense_until, self.backend)

    def run(
        self,
        states: States,
        schedule: Schedule | None = None,
        *,
        cuts: Sequence[int] = (),
        dense_until: int = 0,
        policy: Policy | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Reads a text in calls that begin at `cuts`, with no more kept between them than a cache keeps."""
        queries, keys, values = states
        schedule = schedule or self.schedule()
        reading = self.reading(dense_until, policy)
        rows, tokens, kept = queries.shape[0], queries.shape[2], history(schedule)
        pyramid = Pyramid(self.levels)
        outs = []
        edges = [0, *sorted(cuts), tokens]
        for start, stop in pairwise(edges):
            pyramid.append(keys[:, :, start:stop], values[:, :, start:stop])
            plan = Plan.of([schedule] * rows, [start] * rows, [stop - start] * rows, stop - start, dense_until)
            recent = queries[:, :, max(0, start - kept) : start] if kept else None
            outs.append(read(queries[:, :, start:stop], pyramid, plan, reading, SCALE, recent=recent, record=record))
        return torch.cat(outs, 2)

    def covers(self, states: States, schedule: Schedule | None = None, **options: Any) -> tuple[Tensor, Chosen]:
        """The result and the covers that it rests on."""
        if self.case.evicts:
            pytest.skip("evicts: there is no cover of the text; tests/methods/test_eviction.py has its oracle")
        spy = Spy(options.pop("policy", None) or self.reading().policy)
        return self.run(states, schedule, policy=spy, **options), spy.chosen


def finest(backend: str) -> torch.dtype | None:
    """The most precise type that a backend serves on this machine; None where it serves nothing."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if not BACKENDS[backend].refuse(torch.empty(1, 1, 1, DIM, dtype=dtype, device=DEVICE)):
            return dtype
    return None

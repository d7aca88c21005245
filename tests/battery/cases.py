"""The table of cases: one row per way of reading. Adding a method means adding a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mgam import methods
from mgam.levels import Levels
from mgam.methods import Method
from mgam.policies import Dyadic, Policy, Scored, Window
from mgam.policies.compact import Compact
from mgam.policies.learned import Learned
from mgam.policies.learned_search import SearchWeights
from mgam.settings import Settings

LEVELS = (1, 4, 16)
SMALL: dict[str, Any] = {
    "levels": LEVELS,
    "search": 2,
    "window": 8,
    "block": 8,
    "question_block": 5,
    "dense_until": 0,
}
"""Settings under which texts of some dozen tokens are already read coarsely."""
ENOUGH = 4096
"""More tokens than any text of the battery has."""

Summaries = Callable[[Levels, int, set[int]], list[set[int]]]
"""Levels, first token of the window, chunks opened -> per level 1 and up, the chunks read as summaries."""


def coarsest(levels: Levels, start: int, opened: set[int]) -> list[set[int]]:
    """The rest as coarse as it can be: a chunk is read whole unless it holds something opened, the sink, or window."""
    return _tree(levels, start, opened, lambda level, end: True)


def by_distance(reach: int) -> Summaries:
    """A chunk of level l is read only when `reach` chunks of every finer level lie between it and the window."""

    def summaries(levels: Levels, start: int, opened: set[int]) -> list[set[int]]:
        def far(level: int, end: int) -> bool:
            near = start
            for finer in range(1, level):
                near = max(0, near - reach * levels.sizes[finer])
            return end <= near

        return _tree(levels, start, opened, far)

    return summaries


def nothing(levels: Levels, start: int, opened: set[int]) -> list[set[int]]:
    """No summaries."""
    return [set() for _ in levels.sizes[1:]]


def _tree(levels: Levels, start: int, opened: set[int], may: Callable[[int, int], bool]) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in levels.sizes[1:]]

    def visit(level: int, index: int) -> None:
        size = levels.sizes[level]
        begin, end = index * size, (index + 1) * size
        if begin >= start or (level == 1 and index in opened):
            return
        inside = any(begin <= chunk * levels.chunk < end for chunk in opened)
        if end <= start and not inside and may(level, end):
            found[level - 1].add(index)
        elif level > 1:
            for child in range(index * levels.ratio(level), (index + 1) * levels.ratio(level)):
                visit(level - 1, child)

    for index in range(start // levels.sizes[-1] + 1):
        visit(levels.top, index)
    return found


def sink(available: int) -> int:
    """Chunks opened when only the sink is."""
    return min(available, 1)


def alone(budget: int) -> Callable[[int], int]:
    """Chunks opened by a policy without sink."""
    return lambda available: min(available, budget)


def within(budget: int) -> Callable[[int], int]:
    """Chunks opened besides the sink by a policy with this budget, in chunks."""
    return lambda available: min(available, 1 + budget)


def windowed(decide: int, window: int) -> int:
    """First token that a window holds, before it is rounded to a chunk."""
    return max(0, decide + 1 - window)


def everything(decide: int, window: int) -> int:
    """The window is the whole past."""
    return 0


def exchanging(decide: int, window: int) -> int:
    """The end of the block before the one that a query stands in: blocks have three quarters of the window."""
    size, exchange = window - window // 4, window // 4
    return max(0, decide // size * size - exchange)


@dataclass(frozen=True)
class Case:
    """One way of reading, and the formula of what it reads."""

    name: str
    method: str
    """Name in the registry; what the method declares there is what the battery tests."""
    generous: dict[str, Any] = field(default_factory=lambda: {"window": ENOUGH})
    """Settings under which it must equal dense attention."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings besides the small ones."""
    opens: Callable[[int], int] = sink
    """Chunks before the window -> chunks opened."""
    summaries: Summaries | None = coarsest
    """None: which regions are read finely is decided too."""
    begins: Callable[[int, int], int] = windowed
    """Where a block is decided, and the window -> first token that it must read there."""
    cover: str | None = None
    """What the settings make of the declared cover."""
    make: Callable[[Settings, float], Policy] | None = None
    """A policy other than the method's, for what its settings do not reach."""
    fewer: bool = False
    """Whether it may open fewer: what a block deserves is decided too."""

    @property
    def evicts(self) -> bool:
        """Whether tokens are forgotten, so that covers speak of places among those that are kept."""
        return self.declared.cover == "not a cover"

    @property
    def declared(self) -> Method:
        return methods.get(self.method)

    @property
    def partitions(self) -> bool:
        """Whether every visible token is in exactly one entry (else in at most one)."""
        return (self.cover or self.declared.cover) == "partition"

    def with_settings(self, **changes: Any) -> Settings:
        mass = {"mass": 1.0} if self.declared.mass else {}
        return self.declared.settings(**{**SMALL, **mass, "budget": 8, **self.settings, **changes})

    def policy(self, scale: float, **changes: Any) -> Policy:
        return (self.make or self.declared.policy)(self.with_settings(**changes), scale)

    @property
    def mass(self) -> float:
        """How far summaries count for their tokens."""
        return self.with_settings().mass


def compact(s: Settings, scale: float) -> Policy:
    """The search over shortened keys, from a position on that texts of the battery pass."""
    return Scored(s.budget, s.window, s.rest, s.mass, scale, s.every, Compact(dims=16, bits=8, calibrate=20))


def thinned(s: Settings, scale: float) -> Policy:
    """The search that hears some queries of blocks which are larger than a few."""
    return Scored(s.budget, s.window, s.rest, s.mass, scale, s.every, s.compact, whole=8)


def learned(**dials: Any) -> Callable[[Settings, float], Policy]:
    """A learned policy whose searches mirror and mix the dimensions of queries and keys: it finds what these find."""

    def make(s: Settings, scale: float) -> Policy:
        from .trial import DIM, GROUP, HEADS

        rng = torch.Generator().manual_seed(7)
        signs = torch.randn(HEADS, DIM, 1, generator=rng).sign()
        turn = signs * torch.stack([torch.eye(DIM)[torch.randperm(DIM, generator=rng)] for _ in range(HEADS)])
        query = torch.zeros(HEADS, GROUP * DIM, GROUP * (DIM + 1))
        for head in range(GROUP):  # one search query for each head
            query[:, head * DIM : (head + 1) * DIM, head * (DIM + 1) : head * (DIM + 1) + DIM] = turn * scale
        pull, voice = torch.randn(2, HEADS, GROUP * DIM, generator=rng) * 0.1
        query[:, :, DIM] = pull
        bias = torch.zeros(HEADS, GROUP * (DIM + 1))
        prior = torch.tensor([[0.0, -0.25, -0.25], [0.0, 0.5, 0.0]])
        part = torch.linspace(0.25, 0.75, HEADS)
        weights = SearchWeights(
            "battery",
            GROUP,
            query,
            bias,
            turn,
            torch.zeros(HEADS, DIM),
            turn * scale,
            voice,
            bias[:, 0],
            prior,
            part,
            torch.linspace(1.5, 0.5, HEADS),
        )
        return Learned(weights, s.budget, s.window, s.rest, s.mass, middle=s.middle, **dials)

    return make


CASES = [
    Case("dense", "dense", opens=lambda available: 0, summaries=nothing, begins=everything),
    Case("streaming-llm", "streaming-llm", summaries=nothing),
    Case("dyadic", "dyadic", summaries=by_distance(32)),
    Case("dyadic-near", "dyadic", summaries=by_distance(2), make=lambda s, scale: Dyadic(s.window, reach=2)),
    Case("window-coarse", "dyadic", make=lambda s, scale: Window(s.window, rest="summaries")),
    Case("mgam", "mgam", {"budget": ENOUGH}, opens=within(2)),
    Case("mgam-drop", "mgam", {"budget": ENOUGH}, {"rest": "drop"}, within(2), nothing, cover="drops"),
    Case("mgam-every", "mgam", {"budget": ENOUGH}, {"every": 3, "block": 20}, within(2), make=thinned),
    Case("mgam-half-mass", "mgam", {"budget": ENOUGH}, {"mass": 0.5}, within(2)),
    Case("mgam-compact", "mgam", {"budget": ENOUGH}, {}, within(2), make=compact),
    Case("mgam-flat", "mgam", {"budget": ENOUGH}, {"levels": (1, 4), "budget": 12}, within(3)),
    Case("learned", "mgam", {"budget": ENOUGH}, opens=within(2), make=learned()),
    Case(
        "learned-drop", "mgam", {"budget": ENOUGH}, {"rest": "drop"}, within(2), nothing, cover="drops", make=learned()
    ),
    Case("learned-thin", "mgam", {"budget": ENOUGH}, {"block": 20}, within(2), make=learned(thin=4, whole=8)),
    Case("learned-content", "mgam", {"budget": ENOUGH}, opens=within(2), make=learned(content=1.0)),
    Case("learned-distance", "mgam", {"budget": ENOUGH}, opens=within(2), make=learned(content=0.0)),
    Case("learned-recall", "mgam", opens=within(2), make=learned(mark=0.03), fewer=True),
    Case("learned-middle", "mgam", {"budget": ENOUGH}, {"budget": 12, "middle": 4}, within(2), None, make=learned()),
    Case("quest", "quest", {"budget": ENOUGH}, {}, alone(2), nothing),
    Case("longheads", "longheads", {"budget": ENOUGH}, {}, within(2), nothing),
    Case("snapkv", "snapkv", {"budget": ENOUGH}, {"budget": 12}),
    Case("h2o", "h2o", {"budget": ENOUGH}),
    Case("sliding", "sliding", opens=lambda available: 0, summaries=nothing),
    Case("strided", "strided", opens=lambda available: -(-available // 8), summaries=nothing),
    Case("dilated", "dilated", opens=int.bit_length, summaries=nothing),
    Case("blockwise", "blockwise", opens=lambda available: 0, summaries=nothing, begins=exchanging),
    Case("longformer", "longformer", opens=alone(2), summaries=nothing),
    Case("bigbird", "bigbird", opens=within(2), summaries=nothing),
    Case("moba", "moba", {"budget": ENOUGH}, {}, alone(2), nothing),
    Case("mgam-tall", "mgam", {"budget": ENOUGH}, {"levels": (1, 2, 4, 12), "budget": 6}, within(3)),
]

"""Multi-granular attention as a module: the core's policies over a pyramid of the module's own keys and values."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from mgam.engine import Reading, history, read
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.nn.base import Seen, SelfAttention, above
from mgam.plan import Plan
from mgam.policies import Dyadic, Policy, Scored
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule


class MultiGranularAttention(SelfAttention):
    """One softmax over a cover of the past: fine where it matters, coarse elsewhere.

    Args:
        policy: `scored` opens the chunks that the queries search for; `fixed` takes levels by distance.
        levels, window, budget, block, mass: as in `mgam.Settings`.
    """

    BIDIRECTIONAL = False

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        policy: Literal["scored", "fixed"] = "scored",
        levels: tuple[int, ...] = (1, 16, 64),
        search: int = 4,
        window: int = 64,
        budget: int = 64,
        block: int = 16,
        mass: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        if policy not in ("scored", "fixed"):
            raise SettingError(f"policy={policy!r} is unknown; choose scored or fixed")
        above("window", window, 1)
        above("budget", budget, 0)
        above("block", block, 1)
        if not 0 <= mass <= 1:
            raise SettingError(f"mass={mass} must lie between 0 (a summary counts once) and 1 (once per token)")
        self.levels, self.schedule = Levels(levels, search), Schedule.uniform(block)
        chosen: Policy = Dyadic(window, reach=max(1, budget // levels[1]), mass=mass)
        if policy == "scored":
            chosen = Scored(budget, window, mass=mass, scale=self.scale)
        self.reading = Reading(chosen, self.levels)

    def extra(self, states: Tensor, q: Tensor, first: int) -> dict[str, Tensor]:
        """Queries of blocks that go on may still vote."""
        return {"q": q.detach()}

    def attend(self, seen: Seen) -> Tensor:
        """The core's reading of the new queries."""
        rows, length, kept = len(seen.q), seen.q.shape[2], history(self.schedule)
        pyramid = Pyramid.of(seen.k, seen.v, self.levels)
        plan = Plan.of([self.schedule] * rows, [seen.first] * rows, [length] * rows, length, 0)
        recent = seen.more["q"][:, :, max(0, seen.first - kept) : seen.first]
        return read(seen.q, pyramid, plan, self.reading, self.scale, recent=recent if seen.first else None)

"""What reading a text will take, before it is read: memory by counting, time by a probe of a few seconds.

The probe measures what grows and what does not: two short calls of the model for its weights, and the attention of some
query blocks in one layer at a few depths of a text of random numbers. Between these depths the cost is taken as
linear, and beyond the last one too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from mgam.engine import read
from mgam.integrations.memory import available_bytes, refuse_if_too_large
from mgam.integrations.transformers import Applied
from mgam.integrations.transformers.call_size import call_size
from mgam.plan import Plan
from mgam.policies.base import keeps_state
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule

PROBE_TOKENS = 256
"""Tokens of the longer of two short calls; half as many for a short text."""
FEW_TOKENS = 16
"""Tokens of the shorter one."""
BLOCKS = 4
"""Query blocks whose attention is probed at a time."""
PROBE_BYTES = 1 << 26
"""Keys and values that the attention of one layer is probed over, at most."""


@dataclass(frozen=True)
class Estimate:
    """What reading some texts will take."""

    tokens: int
    seconds: float | None
    """Of reading, without the answer; None for methods that learn or forget while they read, which no probe shows."""
    memory_bytes: int
    """Beyond the loaded weights."""
    free_bytes: int | None
    """Free on the model's device now; None where the system does not tell."""

    def in_words(self) -> str:
        """One line for people."""
        free = "" if self.free_bytes is None else f" ({self.free_bytes / 2**30:,.1f} GiB are free)"
        return f"{self.tokens:,} tokens: {self._time()}about {self.memory_bytes / 2**30:,.1f} GiB{free}"

    def _time(self) -> str:
        if self.seconds is None:
            return ""
        seconds = round(self.seconds)
        hours, minutes = divmod(seconds // 60, 60)
        if seconds < 60:
            said = f"{max(seconds, 1)} s"
        else:
            said = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"
        return f"reading will take about {said}, "


@torch.no_grad()
def estimate(model: Any, tokens: int) -> Estimate:
    """What reading `tokens` tokens will take with a model that mgam was applied to, or not.

    Raises:
        MemoryBudgetError: that much memory is not free; says what would fit.
    """
    need = refuse_if_too_large(model, tokens)
    applied: Applied | None = getattr(model, "_mgam_applied", None)
    seconds = (
        _seconds(model, applied, tokens) if applied is not None and not keeps_state(applied.reading.policy) else None
    )
    return Estimate(tokens, seconds, need.total, available_bytes(model.device))


def _seconds(model: Any, applied: Applied, tokens: int) -> float:
    short = min(PROBE_TOKENS, max(tokens // 8, PROBE_TOKENS // 2))
    decoder = model.get_decoder()

    def call(count: int) -> Any:
        return decoder(input_ids=torch.zeros(1, count, dtype=torch.long, device=model.device), use_cache=False)

    call(FEW_TOKENS)
    few, many = (_timed(model, partial(call, count)) for count in (FEW_TOKENS, short))
    attention = _Attention(model, applied, tokens)
    # What a call costs apart from its tokens matters in a short call and not in a long one.
    weights = few - attention.between(0, FEW_TOKENS), many - attention.between(0, short)
    token = max((weights[1] - weights[0]) / (short - FEW_TOKENS), weights[1] / short / 2, 0.0)
    apart = max(0.0, weights[0] - token * FEW_TOKENS)
    return round(token * tokens + apart * -(-tokens // call_size(model)) + attention.between(0, tokens), 1)


class _Attention:
    """Seconds that attention takes for each token, at any depth of a text, over all multi-granular layers."""

    def __init__(self, model: Any, applied: Applied, tokens: int) -> None:
        self.applied, self.model, self.tokens = applied, model, tokens
        config = model.config.get_text_config(decoder=True)
        self.query_heads = config.num_attention_heads
        self.heads = getattr(config, "num_key_value_heads", None) or self.query_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.query_heads
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        block = applied.settings.block
        self.count = max(1, min(max(tokens // 16, block), BLOCKS * block, tokens))
        per_token = 2 * self.heads * self.dim * model.dtype.itemsize
        deepest = max(min(tokens, PROBE_BYTES // per_token) - self.count, 0)
        self.pyramid = self._pyramid(deepest + self.count)
        self.border = min(applied.reading.dense_until, deepest)
        """Where reading in full ends, and the cost jumps."""
        self.before = self._known(0, max(0, self.border - self.count))
        self.after = self._known(self.border, (self.border + deepest) // 2, deepest)

    def between(self, first: int, last: int) -> float:
        """Seconds for the tokens [first, last)."""
        border = min(max(self.border, first), last)
        return _area(self.before, first, border) + _area(self.after, border, last)

    def _known(self, *depths: int) -> list[tuple[float, float]]:
        """Depths, and what a token costs there."""
        return [(depth + self.count / 2, self._at(depth)) for depth in sorted(set(depths))]

    def _pyramid(self, tokens: int) -> Pyramid:
        like = {"dtype": self.model.dtype, "device": self.model.device}
        pyramid = Pyramid(self.applied.reading.levels)
        keys, values = (torch.randn(1, self.heads, tokens, self.dim, **like) for _ in range(2))
        pyramid.append(keys, values)
        return pyramid

    def _at(self, depth: int) -> float:
        """Seconds for each token of a few blocks that begin at `depth`."""
        scale = self.dim**-0.5
        layer = next(iter(self.applied.layers))
        reading = self.applied.reading_for(layer, scale)
        settings = self.applied.settings
        text = self.tokens + self.count
        schedule = Schedule.reading(text, 1, block=settings.block, question_block=1, lookahead=settings.lookahead)
        plan = Plan.of(
            [schedule], [depth], [self.count], self.count, reading.dense_until, dense_prompt=reading.dense_prompt
        )
        like = {"dtype": self.model.dtype, "device": self.model.device}
        queries, recent = (
            torch.randn(1, self.query_heads, count, self.dim, **like) for count in (self.count, 2 * settings.block)
        )

        def attend() -> Any:
            return read(queries, self.pyramid, plan, reading, scale, softcap=self.softcap, recent=recent, layer=layer)

        attend()  # what layers share is found once for all of them
        seconds = _timed(self.model, attend)
        return seconds * len(self.applied.layers) / self.count


def _area(known: list[tuple[float, float]], first: float, last: float) -> float:
    """The area under a line through known points, drawn out at both ends."""
    if len(known) == 1:
        return known[0][1] * (last - first)
    points = [first, *(place for place, _ in known if first < place < last), last]
    return sum((_height(known, a) + _height(known, b)) / 2 * (b - a) for a, b in pairwise(points))


def _height(known: list[tuple[float, float]], place: float) -> float:
    (low, one), (high, other) = next((pair for pair in pairwise(known) if place <= pair[1][0]), tuple(known[-2:]))
    return max(0.0, one + (other - one) * (place - low) / (high - low))


def _timed(model: Any, run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    _wait(model.device)
    begin = time.perf_counter()
    run()
    _wait(model.device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

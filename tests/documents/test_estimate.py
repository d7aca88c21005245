"""What reading will take: refused in time, near to what it takes, and cheap to find out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mgam.documents import estimate as module
from mgam.documents.estimate import Estimate, estimate
from mgam.errors import MemoryBudgetError
from mgam.integrations.transformers.apply import apply
from mgam.integrations.transformers.call_size import call_size

from . import tiny


def test_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgam.integrations.memory.available_bytes", lambda device: 1000)
    monkeypatch.setattr(module, "_timed", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(MemoryBudgetError, match=r"0\.0 GiB are free"):
        estimate(tiny.make_model(), 5000)


@pytest.mark.parametrize("method", ["mgam", "dense", "dyadic", "quest", "sliding"])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_every_method_and_length(method: str, tokens: int) -> None:
    model = apply(tiny.make_plain_model(window=4096), method, **tiny.SETTINGS)
    found = estimate(model, tokens)
    assert found.seconds is not None
    assert 0 <= found.seconds < 60
    assert found.tokens == tokens
    assert found.memory_bytes > 2 * tokens * 2 * 2 * 8 * 4  # keys and values: layers, heads, dimensions, bytes


@pytest.mark.parametrize("method", ["h2o", "snapkv", "longheads"])
def test_methods_that_no_probe_shows(method: str) -> None:
    model = apply(tiny.make_plain_model(window=4096), method, **{**tiny.SETTINGS, "budget": 256})
    assert estimate(model, 700).seconds is None
    assert estimate(tiny.make_plain_model(), 700).seconds is None


def test_costs_between_the_depths_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that knows what each part costs, the estimate is the sum over all tokens."""
    model = apply(tiny.make_plain_model(window=4096), **{**tiny.SETTINGS, "dense_until": 200})
    monkeypatch.setattr(module, "PROBE_BYTES", 1 << 20)
    apart, weights, dense, base, slope = 0.3, 0.01, 1e-4, 0.002, 3e-6

    def of_token(depth: int) -> float:
        return dense * depth if depth < 200 else base + slope * depth

    def at(self: Any, depth: int) -> float:
        return sum(map(of_token, range(depth, depth + self.count))) / self.count

    def timed(model: Any, run: Callable[[], Any]) -> float:
        count = run().last_hidden_state.shape[1]
        return apart + weights * count + sum(map(of_token, range(count)))

    monkeypatch.setattr(module._Attention, "_at", at)
    monkeypatch.setattr(module, "_timed", timed)
    for tokens in (2000, 5000, 50_000):
        exact = apart * math.ceil(tokens / call_size(model)) + weights * tokens + sum(map(of_token, range(tokens)))
        assert estimate(model, tokens).seconds == pytest.approx(exact, rel=0.03), tokens


def test_the_probe_holds_little(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "randn", lambda *shape, **like: seen.append(shape[2]) or torch.zeros(*shape, **like))
    estimate(tiny.make_model(positions="absolute"), 10_000_000)
    assert max(seen) * 2 * 2 * 8 * 4 <= 1 << 26


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "about 1 s,"),
        (59, "about 59 s,"),
        (61, "about 1 min 1 s,"),
        (7300, "about 2 h 1 min,"),
        (None, "tokens: about"),
    ],
)
def test_in_words(seconds: float | None, said: str) -> None:
    line = Estimate(69_123, seconds, 2**30, 2**33).in_words()
    assert said in line
    assert line.startswith("69,123 tokens: ")
    assert line.endswith("about 1.0 GiB (8.0 GiB are free)")
    assert Estimate(1, None, 2**30, None).in_words().endswith("GiB")

"""Training a small model from scratch on a pattern, with any module of `mgam.nn`: can it learn to attend like this?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from mgam import methods, nn
from mgam.errors import SettingError
from mgam.evaluation.patterns.tasks import IGNORED, Batch, Pattern, make_batch
from mgam.evaluation.registry import unknown

HELD_OUT = 1 << 30
"""Seeds from here on make batches that are never trained on."""
LEARNED = 0.995
"""Accuracy on unseen texts from which on training stops."""
EVERY = 100
"""Steps between looks at unseen texts."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "mgam": {"levels": (1, 8, 32), "search": 2, "window": 16, "budget": 32, "block": 8},
    "sliding": {"window": 32},
    "strided": {"window": 32, "stride": 8},
    "dilated": {"window": 16, "stride": 2},
    "blockwise": {"window": 32, "exchange": 8},
    "longformer": {"window": 32, "global_tokens": 4},
    "bigbird": {"block": 8, "random": 2},
    "linformer": {"rank": 32},
    "reformer": {"bucket": 16, "rounds": 4},
    "performer": {"rank": 64},
    "nsa": {"length": 4, "stride": 2, "select": 4, "blocks": 6, "window": 16},
    "moba": {"block": 8, "blocks": 4},
    "cca": {"group": 4, "window": 16},
    "dga": {"focal": 0.25, "group": 4, "block": 8, "look": 8},
}
"""Small settings of each method: about a quarter of a text of 128 tokens is read token by token."""
CROSS: Mapping[str, Callable[[int, int], nn.CrossAttention]] = {
    "dense": nn.FullCrossAttention,
    "mgam": lambda width, heads: nn.MultiGranularCrossAttention(width, heads, chunk=8, budget=32),
    "performer": lambda width, heads: nn.PerformerCrossAttention(width, heads, rank=64),
}


@dataclass(frozen=True)
class Training:
    """How a small model is trained."""

    length: int = 32
    """Tokens that can be looked at."""
    width: int = 64
    heads: int = 4
    layers: int = 2
    rows: int = 64
    """Texts per step."""
    steps: int = 2000
    rate: float = 2e-3
    """Largest step size of AdamW; it rises over a twentieth of the steps and falls to a tenth as a cosine."""
    keys: int = 16
    """Different keys, and different values."""
    seed: int = 0
    device: str = "cpu"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the attention in place of those in `SIZES`."""

    def __post_init__(self) -> None:
        for name in ("length", "width", "heads", "layers", "rows", "steps", "keys"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be 1 or more")


@dataclass(frozen=True)
class Learned:
    """What a training came to."""

    pattern: str
    method: str
    length: int
    accuracy: float | None
    """On texts that it was not trained on; None where the method has no form of this pattern."""
    steps: int
    seconds: float
    parameters: int
    reason: str = ""
    """Why there is no figure."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def able(pattern: Pattern) -> list[str]:
    """Methods that have a form of a pattern."""
    if pattern.endswith("cross"):
        return list(CROSS)
    causal = pattern == "causal-self"
    kinds = {name: getattr(nn, methods.get(name).module) for name in SIZES}
    return [name for name, kind in kinds.items() if (kind.CAUSAL if causal else kind.BIDIRECTIONAL)]


def module_for(
    method: str, width: int, heads: int, causal: bool, longest: int = 1024, **sizes: Any
) -> nn.SelfAttention:
    """The self-attention of a method at small size; `sizes` are settings in place of those in `SIZES`.

    Raises:
        SettingError: unknown, without a module, or without this direction.
    """
    if method not in SIZES:
        raise SettingError(unknown("method", method, list(SIZES)) + "; these have modules")
    declared = methods.get(method)
    kind, options = getattr(nn, declared.module), {**SIZES[method], **sizes}
    if declared.kind:
        options["kind"] = declared.kind
    if method == "linformer":
        options["longest"] = longest
    return kind(width, heads, causal=causal, **options)


def model_for(pattern: Pattern, method: str, vocabulary: int, how: Training) -> torch.nn.Module:
    """A small model whose attention is the method's, for a pattern.

    Raises:
        SettingError: the method has no form of the pattern; the message names those that have one.
    """
    if method not in SIZES:
        raise SettingError(unknown("method", method, list(SIZES)) + "; these have modules")
    if method not in able(pattern):
        raise SettingError(f"{method} has no form for {pattern}; these have one: {', '.join(able(pattern))}")
    causal = pattern.startswith("causal")
    if pattern.endswith("cross"):
        make = CROSS[method]
        return nn.CrossReader(
            vocabulary, how.width, how.heads, lambda: make(how.width, how.heads), causal=causal, layers=how.layers
        )
    kind = nn.Decoder if causal else nn.Encoder
    longest = 2 * how.length

    def attention() -> nn.SelfAttention:
        return module_for(method, how.width, how.heads, causal, longest, **how.sizes)

    return kind(vocabulary, how.width, attention, layers=how.layers)


def train_pattern(pattern: Pattern, method: str, how: Training) -> Learned:
    """Trains a small model from scratch on one of the four patterns, and scores it on unseen texts."""

    def batch(rows: int, seed: int) -> Batch:
        return make_batch(pattern, rows, how.length, seed, keys=how.keys, device=how.device)

    return train(pattern, pattern, method, batch, how)


def train(name: str, pattern: Pattern, method: str, batch: Callable[[int, int], Batch], how: Training) -> Learned:
    """Trains on what `batch(rows, seed)` makes, of a task that is of a pattern; stops early when all is learned."""
    torch.manual_seed(how.seed)
    try:
        model = model_for(pattern, method, batch(1, 0).vocabulary, how).to(how.device)
    except SettingError as error:
        return Learned(name, method, how.length, None, 0, 0.0, 0, str(error))
    steps = torch.optim.AdamW(model.parameters(), how.rate, weight_decay=0.01, betas=(0.9, 0.98))
    warm = max(1, how.steps // 20)
    rate = torch.optim.lr_scheduler.SequentialLR(
        steps,
        [
            torch.optim.lr_scheduler.LinearLR(steps, 0.05, 1.0, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(steps, max(1, how.steps - warm), how.rate / 10),
        ],
        [warm],
    )
    begin, accuracy, done = time.perf_counter(), 0.0, 0
    for done in range(1, how.steps + 1):
        given = batch(how.rows, how.seed * how.steps + done)
        loss = F.cross_entropy(
            _logits(model, given).flatten(0, 1).float(), given.answer.flatten(), ignore_index=IGNORED
        )
        steps.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        rate.step()
        if done % EVERY == 0 or done == how.steps:
            accuracy = score(model, batch, how)
            if accuracy >= LEARNED:
                break
    seconds = round(time.perf_counter() - begin, 2)
    size = sum(part.numel() for part in model.parameters())
    return Learned(name, method, how.length, round(accuracy, 4), done, seconds, size)


@torch.no_grad()
def score(model: torch.nn.Module, batch: Callable[[int, int], Batch], how: Training) -> float:
    """Share of answers that are right, on texts that no step saw."""
    right = [batch(how.rows, HELD_OUT + number) for number in range(4)]
    return sum(one.accuracy(_logits(model, one)) for one in right) / len(right)


def _logits(model: torch.nn.Module, given: Batch) -> torch.Tensor:
    return model(given.target) if given.source is None else model(given.target, given.source)

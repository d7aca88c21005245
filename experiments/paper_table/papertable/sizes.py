"""How large models, documents and runs are: the table's own size, and a tiny one that checks the machinery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Size:
    """Everything that the protocol fixes but the model, its learning rate and the seed."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    steps: int = 1000
    tokens: int = 32_768
    """Tokens of a step."""
    stages: tuple[tuple[int, float], ...] = (
        (512, 0.35), (1024, 0.2), (2048, 0.2), (4096, 0.12), (8192, 0.08), (16384, 0.05)
    )  # fmt: skip
    """Length of documents, and for what share of the steps."""
    tuning: tuple[tuple[int, float], ...] = ((512, 0.6), (1024, 0.4))
    tuning_share: float = 0.48
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    test: tuple[tuple[int, int], ...] = ((2048, 200), (4096, 200), (8192, 100), (16384, 100))
    """Length, and samples a task."""
    dev: tuple[tuple[int, int], ...] = ((1024, 100),)
    cut: tuple[tuple[int, int], ...] = ((16384, 100),)
    """Of `test`, what MGAM is tested on once more, reading otherwise than in training."""
    granular: dict[str, Any] = field(
        default_factory=lambda: {"levels": (1, 32, 256), "window": 256, "budget": 256, "block": 64, "every": 8}
    )
    window: int = 384
    """Of the Longformer-like model, tokens on a side."""
    keep_seconds: float = 60.0
    """Between checkpoints."""
    check_every: int = 20
    """Steps after which a loss is looked at."""


TINY = Size(
    width=64,
    layers=2,
    heads=2,
    steps=12,
    tokens=1536,
    stages=((512, 0.7), (1024, 0.3)),
    rates=(1e-3, 3e-3),
    test=((512, 6), (1024, 6)),
    dev=((512, 6),),
    cut=((512, 6),),
    granular={"levels": (1, 32, 128), "window": 64, "budget": 64, "block": 32, "every": 4},
    window=128,
    check_every=2,
)
SMOKE = Size(
    width=16,
    layers=1,
    heads=2,
    steps=6,
    tokens=1024,
    stages=((512, 1.0),),
    tuning_share=0.5,
    rates=(1e-3,),
    test=((512, 2),),
    dev=((512, 2),),
    cut=((512, 2),),
    granular={"levels": (1, 32, 128), "window": 64, "budget": 64, "block": 32, "every": 4},
    window=64,
    check_every=1,
)
SIZES = {"paper": Size(), "tiny": TINY, "smoke": SMOKE}

"""What methods of one kind declare alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mgam.methods.registry import Method, register
from mgam.policies import Policy
from mgam.settings import Settings


def register_trained(**declared: Any) -> Method:
    """A method that a model must be trained with: a module of `mgam.nn`, and no policy."""
    alike: dict[str, Any] = {"form": "module", "phase": "training", "mass": False, "positions": ("absolute",)}
    return register(Method(**alike | declared))


def register_pattern(policy: Callable[[Settings], Policy], *, budget: int | None = None, **declared: Any) -> Method:
    """A method that reads by places alone: a window of 1,024 tokens and a fixed pattern; what is outside is dropped."""
    defaults: dict[str, Any] = {"window": 1024, "levels": (1, 64), "rest": "drop", "lookahead": "none"}
    if budget is not None:
        defaults["budget"] = budget
    return register(
        Method(
            policy=lambda s, scale: policy(s),
            cover="drops",
            mass=False,
            choice="none",
            state="K and V of every token",
            defaults=tuple(defaults.items()),
            **{"grows": 1.0} | declared,
        )
    )

"""The registry of methods, and what a method declares."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mgam.errors import SettingError
from mgam.policies import Policy
from mgam.settings import Settings


@dataclass(frozen=True)
class Method:
    """A published way to read a long context, as data and one function."""

    name: str
    title: str
    policy: Callable[[Settings, float], Policy]
    """Makes the policy from settings and the attention scale."""
    paper: str
    """Where it is described."""
    phase: Literal["prefill", "decode", "both", "training"] = "both"
    causal: str = "exact"
    """`exact`, `selection-leak(...)` or `none`."""
    cover: Literal["partition", "drops", "overlaps", "not a cover"] = "partition"
    mass: bool = True
    """Whether summaries are weighted by the tokens they stand for."""
    choice: Literal["shared", "per head", "none"] = "shared"
    """Whether the query heads of a group share one choice."""
    positions: tuple[str, ...] = ("granular", "absolute")
    """Positions it can work with, its own first."""
    needs: tuple[str, ...] = ()
    """Weights, training or calibration that it needs."""
    state: str = "K and V of every token, summaries and search keys"
    """What it keeps per token while decoding."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Settings that differ from the common defaults."""

    def settings(self, **changes: Any) -> Settings:
        """Settings for this method: common defaults, its own, then the caller's."""
        return Settings().with_(**{**dict(self.defaults), **changes, "method": self.name})

    def declared(self) -> dict[str, Any]:
        """Its declared properties as plain values."""
        values = asdict(self)
        del values["policy"]
        values["defaults"] = dict(self.defaults)
        return values


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a method under its name."""
    METHODS[method.name] = method
    return method


def names() -> list[str]:
    """All names."""
    _load()
    return list(METHODS)


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        SettingError: when there is none; names the nearest.
    """
    _load()
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 3) or list(METHODS)
        raise SettingError(f"unknown method {name!r}; did you mean {', '.join(near)}? `mgam methods` lists all")
    return METHODS[name]


def _load() -> None:
    """Imports every file of this folder: a method registers itself."""
    import importlib
    import pkgutil

    import mgam.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")

"""The registry of methods, and what a method declares."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from mgam.errors import SettingError
from mgam.policies import PerLayer, Policy
from mgam.settings import Settings

SEARCH = ("question_budget", "reread", "policy", "recall", "middle", "content", "search_dims", "search_bits", "every")
"""Settings of the search of multi-granular attention, scored or learned."""


def no_policy(settings: Settings, scale: float) -> Policy:
    """For methods that are no policy; `Method.settings` refuses them before this is reached."""
    raise SettingError(f"method {settings.method!r} has no policy")


@dataclass(frozen=True)
class Method:
    """A published way to read a long context, as data and one function."""

    name: str
    title: str
    paper: str
    """Where it is described."""
    policy: Callable[[Settings, float], Policy | PerLayer] = no_policy
    """Makes the policy, or those of the layers, from settings and the attention scale."""
    form: Literal["policy", "loop", "module"] = "policy"
    """How it is used: a policy of an unmodified decoder; a loop around one; a module that must be trained."""
    module: str = ""
    """Its class in `mgam.nn`, if it has one."""
    kind: str = ""
    """Which kind of that class it is, where there are several."""
    dials: Callable[..., Any] = Settings
    """What holds its settings."""
    phase: Literal["prefill", "decode", "both", "training"] = "both"
    causal: str = "exact"
    """`exact`, `selection-leak(...)` or `none`."""
    cover: Literal["partition", "drops", "overlaps", "not a cover"] = "partition"
    searches: bool = False
    """Whether it takes the settings of the search (`SEARCH`), and may drop the rest or summarise it."""
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
    grows: float = 2.0
    """Claimed growth of the time for a text, as the power of its length (phase `decode`: of the time for a token)."""

    def settings(self, **changes: Any) -> Settings:
        """Settings for this method: common defaults, its own, then the caller's.

        Raises:
            SettingError: the method cannot read with an unmodified decoder, or not with these positions, or a setting
                has no part in it; the message says what serves.
        """
        if self.form != "policy":
            raise SettingError(self._elsewhere())
        own = Settings().with_(**dict(self.defaults), method=self.name)
        self._refuse_unused([name for name in changes if changes[name] != getattr(own, name, None)], own)
        wanted = own.with_(**{**changes, "method": self.name})
        if wanted.positions not in self.positions:
            able = [one.name for one in METHODS.values() if one.form == "policy" and wanted.positions in one.positions]
            raise SettingError(
                f"method {self.name!r} works with positions {' or '.join(self.positions)}, not {wanted.positions!r}; "
                f"these do: {', '.join(able)}"
            )
        return wanted

    def checked(self, **changes: Any) -> Any:
        """The dials of a policy or of a loop, with the caller's changes.

        Raises:
            SettingError: a dial is unknown or out of range, or the method must be trained.
        """
        if self.form != "loop":
            return self.settings(**changes)
        known = [one.name for one in fields(self.dials)]  # type: ignore[arg-type]
        if unknown := sorted(set(changes) - set(known)):
            raise SettingError(f"{self.name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        return self.dials(**changes)

    def _refuse_unused(self, changed: list[str], own: Settings) -> None:
        if not self.mass and "mass" in changed:
            raise SettingError(f"method {self.name!r} reads no summaries, so mass has no part in it; leave it out")
        if self.searches:
            return
        if unused := [name for name in SEARCH if name in changed]:
            able = [one.name for one in METHODS.values() if one.searches]
            raise SettingError(
                f"{', '.join(unused)}: method {self.name!r} has no such search; leave it out, or choose "
                f"{' or '.join(able)}"
            )
        if "rest" in changed:
            does = "drops what it does not open" if own.rest == "drop" else "reads all of the past"
            raise SettingError(f"method {self.name!r} {does}: leave rest at {own.rest!r}")

    def _elsewhere(self) -> str:
        if self.form == "loop":
            return (
                f"{self.name} is a loop around a model and needs the question before it reads, so no model can be made "
                f"to read with it; use mgam ask --method {self.name}, mgam.reader(method={self.name!r}) or mgam eval"
            )
        able = [method.name for method in METHODS.values() if method.form == "policy"]
        return (
            f"{self.name} needs {', '.join(self.needs)}: an unmodified model cannot read with it. Put "
            f"mgam.nn.{self.module} into one with mgam.train_with(model, {self.name!r}) and train it, or choose a "
            f"method that needs no training: {', '.join(able)}"
        )

    def declared(self) -> dict[str, Any]:
        """Its declared properties as plain values."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("policy", "dials")}
        values["defaults"] = dict(self.defaults)
        if self.form == "loop":
            values["defaults"] = {one.name: one.default for one in fields(self.dials)}  # type: ignore[arg-type]
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
        near = difflib.get_close_matches(name, METHODS, 3)
        hint = f"did you mean {', '.join(near)}? `mgam methods` lists all" if near else f"choose {', '.join(METHODS)}"
        raise SettingError(f"unknown method {name!r}; {hint}")
    return METHODS[name]


def _load() -> None:
    """Imports every file of this folder: a method registers itself."""
    import importlib
    import pkgutil

    import mgam.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")

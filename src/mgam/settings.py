"""Settings: the dials of `mgam.apply`, with defaults that work."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.policies.base import Rest
from mgam.policies.compact import Compact
from mgam.positions import PositionKind
from mgam.schedule import Lookahead

WIDEST = 1024
"""Dimensions that no head has more of."""


class Dials(TypedDict, total=False):
    """The settings that `apply` takes besides method and budget, for editors and type checkers; see `Settings`."""

    question_budget: int | None
    window: int
    levels: tuple[int, ...]
    search: int
    every: int
    search_dims: int | None
    search_bits: Literal[8, 16]
    rest: Rest
    mass: float
    positions: PositionKind
    dense_until: int | None
    lookahead: Lookahead
    block: int
    question_block: int
    backend: str | None
    policy: str | None
    adapter: str | None
    recall: float | None
    middle: int
    content: float | None
    reread: int


@dataclass(frozen=True)
class Settings:
    """How a model reads. One dial matters, `budget`; the rest has defaults that work.

    Raises:
        SettingError: when a value is of another kind or cannot work; the message names kind or range.
    """

    method: str = "mgam"
    """Name of the method, as `mgam methods` lists them."""

    budget: int = 1024
    """Tokens that a query may read in full outside window and sink, at least one chunk."""

    question_budget: int | None = None
    """The same for what follows the text: the question and the answer, a few dozen queries that may read more than each
    query of a long text. None: an eighth of the trained window, but at most 4,096 tokens and at least the budget."""

    window: int = 512
    """Last tokens before a query that are always read in full."""

    levels: tuple[int, ...] = (1, 64, 1024)
    """Tokens per chunk at each level."""

    search: int = 4
    """Tokens per search key."""

    every: int = 32
    """Every n-th query of a block of text votes; questions, whose blocks are small, are heard in full. 1: all vote."""

    search_dims: int | None = None
    """Dimensions of a search key that are kept, along the principal directions of a text's first 8,192 tokens; None
    keeps all. Half of them search about twice as fast."""

    search_bits: Literal[8, 16] = 16
    """Bits of a number in a search key; blocks that are decided within the first 8,192 tokens search whole keys."""

    rest: Rest = "summaries"
    """What happens to chunks that are not opened: read as summaries, or dropped."""

    mass: float = 0.25
    """How far a summary counts for its tokens, from 0 (as one entry) to 1 (as many times as it has tokens).
    With granular positions far summaries stand close: an unmodified model reads too much into them at 1, and the more
    so the longer the text is."""

    positions: PositionKind = "granular"
    """`granular`: an entry stands at its rank in the cover, so that any length fits the trained window."""

    dense_until: int | None = None
    """Queries before this position read everything in full. None: 4096, or the trained window where that is smaller."""

    lookahead: Lookahead = "block"
    """Who decides a block's cover while a given text is read by `generate` and `ask`: all its queries (`block`), or
    only queries up to its first (`none`). Plain forward passes and generated tokens always use `none`."""

    block: int = 128
    """Queries that share one cover while a document is read."""

    question_block: int = 32
    """The same for the end of a prompt."""

    backend: str | None = None
    """Attention backend; None picks the first that can serve."""

    policy: str | None = None
    """A learned policy: a folder that `mgam fit` wrote, a hub id, or "default", the one that is shipped for the
    default model. None: the training-free search."""

    adapter: str | None = None
    """Low-rank adapters with which the model looks things up better: a folder from `mgam fit --adapter-only`, a hub id,
    or "lookup", those that are shipped for the default model. None: the model as it is."""

    recall: float | None = None
    """Of a learned policy: the share of all attention that is read as tokens on average over texts. Blocks that look
    nearby then open less than the budget. None: every block spends its budget."""

    middle: int = 0
    """Of a learned policy: how much of the budget goes to regions in which nothing is opened, but which are read as
    fine summaries instead of coarse ones."""

    content: float | None = None
    """Of a learned policy: the part of the budget, from 0 to 1, for what its search finds whatever the distance. The
    rest is for expected attention, which favours what is near and rarely falls on a single fact far back. None: each
    KV head has the part that was fitted."""

    reread: int = 0
    """Tokens of passages that are read a second time, by themselves, before a question is answered from them: those
    that it attends to most or that hold its words (`mgam.documents.second_look`). 0: the answer comes at first sight.
    Texts that are read densely, and plain `generate`, know no second look."""

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            _check_kind(name, getattr(self, name), hint)
        levels = self.pyramid_levels
        for name in ("budget", "question_budget"):
            value = getattr(self, name)
            if value is not None and value < levels.chunk:
                raise SettingError(
                    f"{name}={value!r} must be a whole number of tokens, at least one chunk ({levels.chunk})"
                )
        if 0 != self.reread < levels.chunk:
            raise SettingError(
                f"reread={self.reread!r} must be a whole number of tokens, at least one chunk ({levels.chunk}), or 0"
            )
        for name in ("window", "block", "question_block", "every"):
            value = getattr(self, name)
            if value < 1:
                raise SettingError(f"{name}={value!r} must be a whole number, 1 or more")
        self.compact  # noqa: B018  (refuses what cannot be kept)
        if not 0 <= self.mass <= 1:
            raise SettingError(f"mass={self.mass!r} must lie between 0 (a summary counts once) and 1 (once per token)")
        if self.recall is not None and (self.policy is None or not 0 < self.recall <= 1):
            raise SettingError(
                f"recall={self.recall!r} must lie above 0 and be at most 1, and needs a learned policy (policy=FOLDER)"
            )
        if not 0 <= self.middle <= self.budget - levels.chunk:
            raise SettingError(
                f"middle={self.middle!r} must be a whole number from 0 to the budget less one chunk "
                f"({self.budget - levels.chunk})"
            )
        if self.content is not None and not 0 <= self.content <= 1:
            raise SettingError(f"content={self.content!r} is a part of the budget, from 0 (attention alone) to 1")
        if self.policy is not None and self.positions != "granular":
            raise SettingError(
                f"a learned policy looks at keys before rotation, which positions={self.positions!r} do not keep; "
                "leave positions at 'granular'"
            )
        if self.dense_until is not None and self.dense_until < 0:
            raise SettingError(f"dense_until={self.dense_until} must be 0 or more positions, or None for the default")

    @property
    def pyramid_levels(self) -> Levels:
        """The levels as the core takes them."""
        return Levels(tuple(self.levels), self.search)

    @property
    def compact(self) -> Compact | None:
        """How search keys are shortened; None: they are not."""
        if self.search_dims is None and self.search_bits == 16:
            return None
        return Compact(WIDEST if self.search_dims is None else self.search_dims, self.search_bits)

    def with_(self, **changes: Any) -> Settings:
        """The same settings with some changed; unknown names are refused with the known ones."""
        known = [field.name for field in fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise SettingError(f"unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
        return replace(self, **{name: _plain(value) for name, value in changes.items()})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for results and JSON."""
        return {**asdict(self), "levels": list(self.levels)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `mgam.json` into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "mgam.json").write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Settings:
        """Reads `mgam.json` from a folder."""
        path = Path(folder) / "mgam.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            said = f"{path} cannot be read as settings ({error}); write it with Settings.save_pretrained"
            raise SettingError(said) from error
        if not isinstance(values, dict):
            raise SettingError(
                f"{path} holds {type(values).__name__} {values!r:.60}, where settings by their names are wanted; "
                "write it with Settings.save_pretrained"
            )
        return cls().with_(**values)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", _whole),
    float: ("a number", lambda value: _whole(value) or isinstance(value, float)),
    str: ("text", lambda value: isinstance(value, str)),
    tuple[int, ...]: (
        "whole numbers such as (1, 64, 1024)",
        lambda value: isinstance(value, tuple | list) and all(map(_whole, value)),
    ),
    NoneType: ("None", lambda value: value is None),
}
"""Kinds of settings: in words, and how a value of the kind is known."""


@functools.cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Settings)


def _check_kind(name: str, value: object, hint: Any) -> None:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        fits = any(type(value) is type(choice) and value == choice for choice in choices)
        wanted = [repr(choice) for choice in choices]
    else:
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        fits = any(_KINDS[kind][1](value) for kind in kinds)
        wanted = [_KINDS[kind][0] for kind in kinds]
    if not fits:
        raise SettingError(f"{name}={value!r} must be {' or '.join(wanted)}")


def _plain(value: Any) -> Any:
    """A value as settings hold it: JSON has lists in place of tuples, and a folder may come as a path."""
    if isinstance(value, list):
        return tuple(value)
    return str(value) if isinstance(value, Path) else value

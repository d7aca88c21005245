"""What every trainable attention module shares: projections, positions, padding, and a streaming state."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mgam.errors import SettingError
from mgam.kernels import serve
from mgam.positions import Rotary, rotate

# Shape letters: B rows, T tokens so far, L new tokens, H query heads, K KV heads, G = H/K, D head dim.

TABLE = 4096
"""The rotary table grows by so many positions."""


@dataclass(frozen=True)
class Seen:
    """What a module attends with: new queries, and keys and values of all tokens so far that they may read.

    Shapes: states (B, L, width); q (B, H, L, D); k, v (B, K, T - gone, D); more: all that is known, by name.
    """

    states: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    more: dict[str, Tensor]
    gone: int = 0
    """Tokens that no query reads any more, and whose keys and values were let go."""

    @property
    def first(self) -> int:
        """Position of the first new query."""
        return self.gone + self.k.shape[2] - self.q.shape[2]

    @property
    def own(self) -> Tensor:
        """Positions of the new queries (L,)."""
        return torch.arange(self.first, self.first + self.q.shape[2], device=self.q.device)


@dataclass
class State:
    """What a causal module keeps from call to call: what later tokens may read of those so far, or sums over them."""

    kept: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


class SelfAttention(nn.Module, ABC):
    """Self-attention over hidden states (B, T, width), causal or bidirectional.

    Args:
        width: size of hidden states.
        heads: query heads.
        kv_heads: KV heads, a divisor of `heads`; None for as many.
        causal: whether a token sees only its past.
        rotary: whether queries and keys are rotated by their positions.

    Raises:
        SettingError: for sizes that do not divide, and for a direction that the method does not have.
    """

    CAUSAL: ClassVar[bool] = True
    """Whether the method has a causal form."""
    BIDIRECTIONAL: ClassVar[bool] = True
    """Whether the method has a bidirectional form."""
    LEAK: ClassVar[str] = ""
    """How later tokens reach earlier outputs of the causal form, as published; empty where they do not."""

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, *, causal: bool = True, rotary: bool = True
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or width % heads or (width // heads) % 2:
            raise SettingError(f"width={width} must be an even multiple of heads={heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise SettingError(f"kv_heads={kv_heads} must divide heads={heads}")
        self._check_direction(causal)
        self.width, self.heads, self.kv_heads, self.dim, self.causal = width, heads, kv_heads, width // heads, causal
        self.scale = self.dim**-0.5
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rotary = Rotary.plain(self.dim, TABLE) if rotary else None

    def _check_direction(self, causal: bool) -> None:
        if self.CAUSAL if causal else self.BIDIRECTIONAL:
            return
        able = sorted(kind.__name__ for kind in _kinds() if (kind.CAUSAL if causal else kind.BIDIRECTIONAL))
        raise SettingError(
            f"{type(self).__name__} has no {'causal' if causal else 'bidirectional'} form; choose causal={not causal}, "
            f"or one of {', '.join(able)}"
        )

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over whole texts.

        Shapes: states (B, T, width); mask (B, T), True for tokens. A row's tokens may be padded on either side, and are
        read as if the row were alone; columns of padding give zeros. Returns the shape of `states`.

        Raises:
            SettingError: for states or a mask of another shape, and when a row's tokens do not stand together.
        """
        check_states(states, self.width)
        places = live_places(mask, states)
        if places is None:
            return self._whole(states)
        out = torch.zeros_like(states)
        for row, place in places:
            out[row, place] = self._whole(states[row : row + 1, place])[0]
        return out

    def step(self, states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next tokens (B, L, width) of texts that were read up to `state` (None: nothing yet).

        Returns their outputs, equal to what `forward` gives for the whole text, and the new state.

        Raises:
            SettingError: for a bidirectional module, and for states or rows that do not fit.
        """
        state = self._begun(states, state)
        if not states.shape[1]:
            return states.clone(), state
        q, new = self._project(states, state.tokens)
        known, tokens = self.known(q, new, state), state.tokens + states.shape[1]
        out = self.attend(Seen(states, q, known["k"], known["v"], known, tokens - known["k"].shape[2]))
        return self._merge(out), State(self.keep(known, tokens), tokens)

    def _begun(self, states: Tensor, state: State | None) -> State:
        """What was read so far, after checking that the next states can follow it."""
        if not self.causal:
            name = type(self).__name__
            raise SettingError(f"this {name} is bidirectional and cannot stream; make it with causal=True")
        check_states(states, self.width)
        for part in (state or State()).kept.values():
            if len(part) != len(states):
                raise SettingError(f"{len(states)} rows were given for a state of {len(part)}; the same rows go on")
        return state or State()

    @abstractmethod
    def attend(self, seen: Seen) -> Tensor:
        """Attention of the new queries: (B, H, L, D)."""

    def extra(self, states: Tensor, q: Tensor, first: int) -> dict[str, Tensor]:
        """What must be known of every token besides keys and values, by name: (B, any, L, any)."""
        return {}

    def copy_projections(self) -> None:
        """Begins projections that a method has besides as copies of the ordinary ones.

        Call it after weights were loaded into those.
        """

    def known(self, q: Tensor, new: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        """All that is known after new tokens, by name: what was kept of earlier ones, joined with what is new."""
        return state.kept | {name: longer(state.kept.get(name), part) for name, part in new.items()}

    def keep(self, known: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """What queries from position `tokens` on may read of all that is known."""
        return known

    def _whole(self, states: Tensor) -> Tensor:
        if not states.shape[1]:
            return states.clone()
        q, new = self._project(states, 0)
        known = self.known(q, new, State())
        return self._merge(self.attend(Seen(states, q, known["k"], known["v"], known)))

    def _project(self, states: Tensor, first: int) -> tuple[Tensor, dict[str, Tensor]]:
        q = self.turned(self.split(self.query(states)), first)
        k = self.turned(self.split(self.key(states)), first)
        new = {"k": k, "v": self.split(self.value(states))}
        return q, {**new, **self.extra(states, q, first)}

    def split(self, states: Tensor) -> Tensor:
        """(B, L, n*D) -> (B, n, L, D)."""
        return states.unflatten(2, (-1, self.dim)).transpose(1, 2)

    def turned(self, states: Tensor, first: int) -> Tensor:
        """States (B, n, L, D) rotated by their positions from `first` on."""
        if self.rotary is None:
            return states
        last = first + states.shape[2]
        cos, sin = self.rotary.table(states.device, states.dtype, max(last, TABLE))
        if serve(states):
            from mgam.nn.fused.rotary import Rotation, serves

            if serves(states, cos.shape[1]):
                with torch.cuda.device_of(states):  # as kernels are launched on the current device
                    return Rotation.apply(states, cos[first:last], sin[first:last])
        return rotate(states, cos[first:last], sin[first:last])

    def _merge(self, heads: Tensor) -> Tensor:
        return self.out(heads.transpose(1, 2).flatten(2))


def _kinds() -> set[type[SelfAttention]]:
    """All modules that this package offers."""
    found, new = set[type[SelfAttention]](), SelfAttention.__subclasses__()
    while new:
        kind = new.pop()
        new += kind.__subclasses__()
        if kind.__module__.startswith("mgam.") and not inspect.isabstract(kind):
            found.add(kind)
    return found


def longer(before: Tensor | None, new: Tensor) -> Tensor:
    """What is known of earlier tokens (B, any, T, any), if anything, and of new ones."""
    return new if before is None else torch.cat((before, new), 2)


def last(states: Tensor, count: int) -> Tensor:
    """The last `count` of some states (B, any, T, any), so that the others can be freed."""
    first = states.shape[2] - count
    return states if first <= 0 else states[:, :, first:].clone()


def check_states(states: Tensor, width: int) -> None:
    """Refuses what are no hidden states of this width.

    Raises:
        SettingError: naming the shape that is wanted.
    """
    if states.dim() != 3 or states.shape[2] != width or not states.is_floating_point():
        raise SettingError(
            f"{states.dtype} of shape {tuple(states.shape)} was given; hidden states (rows, tokens, {width}) are wanted"
        )


def live_places(mask: Tensor | None, states: Tensor) -> list[tuple[int, slice]] | None:
    """Rows of a text (B, T, width) that have tokens, and where these stand; None where all columns are tokens.

    Raises:
        SettingError: for a mask (B, T) of another shape, and when a row's tokens do not stand together.
    """
    if mask is None:
        return None
    if mask.shape != states.shape[:2]:
        raise SettingError(
            f"a mask of shape {tuple(mask.shape)} was given for states of shape {tuple(states.shape)}; "
            f"{tuple(states.shape[:2])} is wanted, True for tokens"
        )
    if bool(mask.all()):
        return None
    places = []
    for row, live in enumerate(mask.bool()):
        columns = live.nonzero().flatten().tolist()
        if columns:
            place = slice(columns[0], columns[-1] + 1)
            if place.stop - place.start != len(columns):
                raise SettingError(f"the mask of row {row} has holes; a row's tokens must stand together")
            places.append((row, place))
    return places


def above(name: str, value: int, least: int) -> None:
    """Refuses what is no whole number, or one that is too small.

    Raises:
        SettingError: naming the range.
    """
    if value != int(value) or value < least:
        raise SettingError(f"{name}={value} must be a whole number, {least} or more")

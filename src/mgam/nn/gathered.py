"""What blocks of queries read, side by side: entries of a trainable pyramid by a cover, window first."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mgam.cover import indices
from mgam.levels import Levels
from mgam.nn.chosen import Chosen
from mgam.nn.scores import Part

# Shape letters: B rows, H KV heads, N blocks of queries, C chunks of n tokens, E entries, M some of them, D.

CLOSED = -1e9
"""Logit of an entry that is not there."""


@dataclass
class Gathered:
    """Entries of blocks. Shapes: keys (B, H, N, E, D+), values (B, H, N, E, D); bias, of logits, and said (B, H, N, E).

    `said` is what a policy scores the region that an entry belongs to; CLOSED where there is nothing.
    """

    shape: tuple[int, int, int]
    zero: Tensor
    """Of the type and device of biases."""
    _keys: list[Tensor] = field(default_factory=list)
    _values: list[Tensor] = field(default_factory=list)
    _bias: list[Tensor] = field(default_factory=list)
    _said: list[Tensor] = field(default_factory=list)

    def add(
        self, live: Tensor, states: tuple[Tensor, Tensor], bias: Tensor | None, said: Tensor | None, weight: float = 0.0
    ) -> None:
        """More entries, those that are `live`, with `weight` added to their bias; all broadcast over blocks."""
        keys, values = (one.expand(*self.shape, *one.shape[3:]) for one in states)
        self._keys.append(keys)
        self._values.append(values)
        wide = (*self.shape, keys.shape[3])
        self._bias.append(torch.where(live, (self.zero if bias is None else bias) + weight, CLOSED).expand(wide))
        if said is not None:
            self._said.append(torch.where(live, said, CLOSED).expand(wide))

    def fill(self, multiple: int) -> None:
        """Entries that are not there, up to a multiple of so many: kernels want it."""
        spare = -sum(one.shape[-1] for one in self._bias) % multiple
        keys, values = (part[0].new_zeros(()).expand(*self.shape, spare, part[0].shape[-1])
                        for part in (self._keys, self._values))  # fmt: skip
        live = torch.zeros(spare, dtype=torch.bool, device=keys.device)
        self.add(live, (keys, values), None, self.zero if self._said else None)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values, bias, said."""
        said = torch.cat(self._said, -1) if self._said else None
        return torch.cat(self._keys, 3), torch.cat(self._values, 3), torch.cat(self._bias, -1), said


@dataclass(frozen=True)
class Voice:
    """A number for each chunk (B, H, N, C) and for what is near (B, H, N), of which coarser regions have one too.

    `sums`: a region's number is the logarithm of summed exponentials; else the mean.
    """

    chunks: Tensor
    near: Tensor
    sums: bool = False

    def coarser(self, ratio: int) -> Voice:
        """The same of regions of `ratio` of these."""
        wide = (0, -self.chunks.shape[-1] % ratio)
        parts = F.pad(self.chunks, wide, value=-torch.inf if self.sums else 0.0).unflatten(-1, (-1, ratio))
        return Voice(parts.logsumexp(-1) if self.sums else parts.mean(-1), self.near, self.sums)


def gather(
    part: Part,
    begin: int,
    side: int,
    chosen: Chosen,
    levels: Levels,
    mass: float,
    most: list[int],
    pyramid: list[Tensor],
    gate: Voice | None,
    told: Voice | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys, values, bias of logits, and what the policy says of each entry's region; see `Gathered`.

    Entries come as window, ends of the text, opened chunks, summaries level by level. `begin` is the number of the
    first block, `side` the tokens of a window before its block;
    `most` the most summaries of each level but the coarsest.
    """
    keys, values, *upper = pyramid
    rows, heads, _, chunk, _ = keys.shape
    device = keys.device
    zero = keys.new_zeros((), dtype=torch.promote_types(keys.dtype, torch.float32))
    found = Gathered((rows, heads, len(part.start)), zero)

    def near(voice: Voice | None) -> Tensor | None:
        return None if voice is None else voice.near[..., None]

    def of(voice: Voice | None, index: Tensor, again: int = 1) -> Tensor | None:
        if voice is None:
            return None
        said = voice.chunks.gather(-1, index)
        return said.repeat_interleave(again, -1) if again > 1 else said

    after = 0 if part.causal else side
    place = part.start[:, None] - side + torch.arange(side + part.block + after, device=device)
    windows = (_windows(keys, part, begin, side, after), _windows(values, part, begin, side, after))
    found.add((place >= 0) & (place < part.tokens), windows, near(gate), near(told))
    inside = torch.arange(chunk, device=device)
    ends = [(0, part.left >= chunk)]
    if not part.causal and part.tokens % chunk:
        ends.append((part.tokens // chunk, part.right <= part.tokens // chunk * chunk))
    for number, there in ends:
        live = there[:, None] & (number * chunk + inside < part.tokens)
        found.add(live, (keys[:, :, None, number], values[:, :, None, number]), near(gate), near(told))
    index = chosen.opened
    if index.shape[-1]:
        live, safe = (index >= 0).repeat_interleave(chunk, -1), index.clamp_min(0)
        states = (_rows(keys, safe).flatten(3, 4), _rows(values, safe).flatten(3, 4))
        found.add(live, states, of(gate, safe, chunk), of(told, safe, chunk))
    for level, read in enumerate(chosen.read, start=1):
        key, value = upper[2 * level - 2 : 2 * level]
        weight = mass * math.log(levels.sizes[level])
        if level > 1:
            gate, told = (voice and voice.coarser(levels.ratio(level)) for voice in (gate, told))
        if level == levels.top:
            states = (key[:, :, None], value[:, :, None])
            coarse = [None if one is None else one.chunks for one in (gate, told)]
            found.add(read, states, coarse[0], coarse[1], weight)
            break
        index = indices(read, most[level - 1])
        safe = index.clamp_min(0)
        found.add(index >= 0, (_rows(key, safe), _rows(value, safe)), of(gate, safe), of(told, safe), weight)
    found.fill(16)
    return found.tensors()


def _windows(chunks: Tensor, part: Part, begin: int, side: int, after: int) -> Tensor:
    """States (B, H, N, W, D) in the windows of blocks, a view of those in chunks (B, H, C, n, D)."""
    flat = F.pad(chunks.flatten(2, 3), (0, 0, side, after))[:, :, begin * part.block :]
    found = flat.unfold(2, side + part.block + after, part.block)
    return found[:, :, : len(part.start)].transpose(-1, -2)


def _rows(states: Tensor, index: Tensor) -> Tensor:
    """Entries (B, H, N, M, ...) of states (B, H, C, ...) at index (B, H, N, M)."""
    rows, heads, count = states.shape[:3]
    base = torch.arange(rows * heads, device=index.device).view(rows, heads, 1, 1) * count
    return states.flatten(0, 2).index_select(0, (index + base).flatten()).unflatten(0, index.shape)

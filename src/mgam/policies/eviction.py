"""Policies that forget tokens for good: what is left closes up, is read whole, and is all that takes memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mgam import kernels
from mgam.cover import indices, window_start
from mgam.errors import SettingError
from mgam.policies.base import Heard
from mgam.policies.fixed import Full, Window
from mgam.policies.scored import highest
from mgam.positions import Positions, rotate
from mgam.pyramid import Pyramid

ELEMENTS, GPU_ELEMENTS = 1 << 24, 1 << 27
"""Attention weights written out at a time."""


@dataclass(frozen=True)
class Sliding(Window):
    """Window and sink, of which the rest is not only unread but gone (Xiao et al. 2024).

    Whole chunks are forgotten, and only when `spare` tokens and more can go at once.
    """

    spare: int = 512
    """Tokens kept before the window, so that a cache can be cropped by so many."""

    by_block = False

    def evict(self, heard: Heard, begin: list[int], pyramid: Pyramid) -> None:
        """Forgets the chunks between the sink and what is read from now on."""
        if not pyramid.in_memory:
            return
        levels, gone = pyramid.levels, pyramid.gone or [0] * len(begin)
        here = torch.tensor(begin) - torch.tensor(gone)
        first = torch.where(torch.tensor(begin) < 0, 0, window_start(here - self.spare, self.window, levels)).tolist()
        if max(first, default=0) - levels.chunk < max(self.spare, levels.chunk):
            return
        places, floor = [], pyramid.floor
        for row, (start, count) in enumerate(zip(first, pyramid.held, strict=True)):
            sink = min(levels.chunk, start)
            place = torch.cat((torch.arange(sink), torch.arange(start, count)))
            places.append(place[None])
            if start > sink:
                floor[row] = begin[row] - self.spare
        pyramid.keep(places, floor)

    def count(self, heard: Heard, read_to: list[int], pyramid: Pyramid) -> None:
        """Nothing is counted."""


@dataclass(frozen=True)
class SnapKV(Full):
    """After the prompt, keeps the tokens that its last queries attend to (Li et al. 2024, arXiv 2404.14469).

    Importance: softmax weights of the last `look` queries, averaged over the group's heads, summed, and smoothed over
    `smooth` neighbours. The first `sink` and the last `recent` tokens are always kept; `capacity` per KV head in all.
    """

    capacity: int = 1024
    look: int = 256
    recent: int = 128
    sink: int = 4
    smooth: int = 21
    scale: float = 1.0

    by_block = False

    def __post_init__(self) -> None:
        if self.capacity < self.recent + self.sink:
            raise SettingError(
                f"budget={self.capacity}: snapkv always keeps the {self.sink} first and the {self.recent} last tokens "
                f"of a prompt, so its budget starts at {self.recent + self.sink}"
            )

    def observe(self, heard: Heard, pyramid: Pyramid) -> None:
        """Keeps the last queries of the prompt until it ends."""
        kept = pyramid.carried.get(LastQueries)
        if not isinstance(kept, LastQueries):
            kept = LastQueries([heard.queries[row, :, :0] for row in range(len(heard.before))])
            pyramid.carried[LastQueries] = kept
        for row, (old, end) in enumerate(zip(heard.before, heard.dense_to, strict=True)):
            new = min(end, pyramid.lengths[row])
            if old < new:
                known = torch.cat((kept.rows[row], heard.between(row, old, new)), 1)
                kept.rows[row] = known[:, -self.look :].clone()

    def evict(self, heard: Heard, begin: list[int], pyramid: Pyramid) -> None:
        """Forgets what the end of the prompt shows to matter least, once."""
        kept = pyramid.carried[LastQueries]
        assert isinstance(kept, LastQueries)
        ends = [
            end if asking.shape[1] and self.capacity < end <= start else 0
            for asking, end, start in zip(kept.rows, heard.dense_to, begin, strict=True)
        ]
        if not any(ends):
            return
        device, heads = pyramid.keys[0].device, pyramid.keys[0].shape[1]
        places, floor = [], pyramid.floor
        for row, end in enumerate(ends):
            held = torch.arange(pyramid.held[row], device=device).expand(heads, -1)
            if end:
                asking = kept.rows[row]
                keys, group = pyramid.keys[0][row, :, :end], asking.shape[0] // heads
                first = end - asking.shape[1]
                weights = masses(asking[None], first, keys[None], self.scale, heard.positions)[0] / group
                smooth = F.avg_pool1d(weights[None], self.smooth, 1, self.smooth // 2)[0]
                smooth[:, : self.sink] = torch.inf
                smooth[:, end - self.recent :] = torch.inf
                chosen = highest(smooth, self.capacity).nonzero()[:, 1].view(heads, self.capacity)
                held = torch.cat((chosen, held[:, end:]), 1)
                floor[row] = end
                kept.rows[row] = asking[:, :0]
            places.append(held)
        pyramid.keep(places, floor)

    def count(self, heard: Heard, read_to: list[int], pyramid: Pyramid) -> None:
        """Nothing is counted: what matters is known when the prompt ends."""


class LastQueries:
    """The last queries (H*G, n, D) of each row."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows by index."""
        self.rows = [self.rows[row] for row in rows.tolist()]

    def crop(self, lengths: Sequence[int]) -> None:
        """A prompt is not cropped before it ends."""


@dataclass(frozen=True)
class HeavyHitters(Full):
    """Keeps the tokens with the most attention so far, and the last ones (H2O: Zhang et al. 2023, arXiv 2306.14048).

    Attention is summed over all queries that were read while a token was kept, and over the group's heads. A block
    reads what is kept and itself; after it the least attended of the older tokens go, until `heavy` and the `recent`
    last ones are left. Scores leave a soft cap on logits out.
    """

    heavy: int = 512
    recent: int = 512
    scale: float = 1.0

    by_block = True

    @property
    def window(self) -> int:
        """Tokens kept, for the room that a block takes."""
        return self.heavy + self.recent

    def observe(self, heard: Heard, pyramid: Pyramid) -> None:
        """Begins to count."""
        if Attended not in pyramid.carried:
            if any(heard.before):
                raise SettingError("h2o must see a text from its first token on; begin with an empty cache")
            heads = pyramid.keys[0].shape[1]
            wide = torch.promote_types(heard.queries.dtype, torch.float32)
            none = heard.queries.new_zeros(heads, 0, dtype=wide)
            pyramid.carried[Attended] = Attended([none] * len(heard.before), [0] * len(heard.before))

    def evict(self, heard: Heard, begin: list[int], pyramid: Pyramid) -> None:
        """Forgets the least attended of the older tokens."""
        kept = pyramid.carried[Attended]
        assert isinstance(kept, Attended)
        places, floor = {}, pyramid.floor
        alike: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for row, (start, held) in enumerate(zip(begin, pyramid.held, strict=True)):
            old = start - (pyramid.lengths[row] - held) - self.recent
            alike[held, kept.rows[row].shape[1], old if old > self.heavy else 0].append(row)
        if not any(old for *_, old in alike):
            return
        for (held, _, old), rows in alike.items():
            scores = torch.stack([kept.rows[row] for row in rows])
            place = torch.arange(held, device=scores.device).expand(*scores.shape[:2], -1)
            if old:
                best = place[..., :0]
                if self.heavy:
                    best = indices(highest(scores[..., :old], self.heavy), self.heavy)
                scores = torch.cat((scores.gather(2, best), scores[..., old:]), 2)
                place = torch.cat((best, place[..., old:]), 2)
            for number, row in enumerate(rows):
                kept.rows[row], places[row] = scores[number], place[number]
                floor[row] = begin[row] if old else floor[row]
        pyramid.keep([places[row] for row in range(len(begin))], floor)

    def count(self, heard: Heard, read_to: list[int], pyramid: Pyramid) -> None:
        """Adds what the queries that were just read attended to."""
        kept = pyramid.carried[Attended]
        assert isinstance(kept, Attended)
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, (seen, stop) in enumerate(zip(kept.seen, read_to, strict=True)):
            if seen < stop:
                gone = pyramid.lengths[row] - pyramid.held[row]
                alike[seen - gone, stop - gone].append(row)
        for (first, end), rows in alike.items():
            queries = torch.stack([heard.between(row, kept.seen[row], read_to[row]) for row in rows])
            keys = torch.stack([pyramid.keys[0][row, :, :end] for row in rows])
            found = masses(queries, first, keys, self.scale, heard.positions)
            found[..., :first] += torch.stack([kept.rows[row] for row in rows])
            for number, row in enumerate(rows):
                kept.rows[row], kept.seen[row] = found[number], read_to[row]


class Attended:
    """Attention (H, n) that each kept token got, and how far each row was counted."""

    def __init__(self, rows: list[Tensor], seen: list[int]) -> None:
        self.rows, self.seen = rows, seen

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows by index."""
        order = rows.tolist()
        self.rows, self.seen = [self.rows[row] for row in order], [self.seen[row] for row in order]

    def crop(self, lengths: Sequence[int]) -> None:
        """Refused: what forgotten queries attended to is not known any more."""
        if any(length < seen for length, seen in zip(lengths, self.seen, strict=True)):
            raise SettingError(
                "h2o sums the attention of every query, so its cache cannot be cropped; use a method that keeps every "
                "token for assisted decoding"
            )


def masses(queries: Tensor, first: int, keys: Tensor, scale: float, positions: Positions) -> Tensor:
    """Causal softmax weights that each key gets, (R, H, n), summed over queries and the heads of a group.

    Shapes: queries (R, H*G, m, D) stand at places `first` and on, keys (R, H, n, D) at places 0 and on.
    """
    rows, heads, count, _ = keys.shape
    own = first + torch.arange(queries.shape[2], device=keys.device)
    if positions.kind == "granular":
        assert positions.rotary is not None
        cos, sin = positions.rotary.table(keys.device, keys.dtype, max(count, positions.rotary.limit))
        keys, queries = rotate(keys, cos[:count], sin[:count]), rotate(queries, cos[own], sin[own])
    if kernels.serve(keys):
        from mgam.policies import attended_triton

        return attended_triton.masses(queries, first, keys, scale)
    wide = torch.promote_types(keys.dtype, torch.float32)
    found = torch.zeros(rows, heads, count, dtype=wide, device=keys.device)
    place = torch.arange(count, device=keys.device)
    step = max(1, (GPU_ELEMENTS if keys.is_cuda else ELEMENTS) // max(1, rows * queries.shape[1] * count))
    for low in range(0, queries.shape[2], step):
        part = queries[:, :, low : low + step].unflatten(1, (heads, -1))
        end = min(count, first + low + part.shape[3])  # no query of this part sees a later key
        logits = torch.einsum("rhgqd,rhnd->rhgqn", part, keys[:, :, :end]).to(wide) * scale
        future = place[:end] > own[low : low + step, None]
        weights = torch.softmax(logits.masked_fill(future, -torch.inf), -1).nan_to_num(0.0)
        found[..., :end] += weights.sum((2, 3))
    return found

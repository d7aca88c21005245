"""The pyramid: keys and values of the past at every level, with search keys, growing as text arrives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from mgam import kernels
from mgam.cover import Cover
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.schedule import Blocks, sent


def search_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of search keys: rounding them costs no recall, so half precision, except for the float64 oracle."""
    return dtype if dtype == torch.float64 else torch.bfloat16


class Carried(Protocol):
    """What a policy keeps beside a pyramid."""

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows by index."""
        ...

    def crop(self, lengths: Sequence[int]) -> None:
        """Forgets what came after the first `lengths[b]` tokens of each row."""
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """A pyramid whose tokens are not in memory: what is read of them is brought together first."""

    def near(self, cover: Cover, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, K*chunk + W, D) of each block's opened chunks, then of its window, side by side."""
        ...


class Pyramid:
    """Tokens and summaries of one layer, for a batch of rows that each start at their first real token.

    Shapes (B rows, H KV heads, D head dim, C chunks of level 1, S search keys per chunk):
        keys[l], values[l]: (B, H, >=T//size[l], D); level 0 is the tokens, of which the first `lengths[b]` of row b
            are set; the others are means over complete chunks
        search: (B, H, S, >=C, D), means over `levels.search` keys of complete chunks, by place in the chunk first
    """

    in_memory = True
    """Whether keys[0] and values[0] hold every token. A subclass that keeps them elsewhere overrides how they are read
    (`chunks`, `window`, `prefix`) and written (`put`, `complete`, `_widen_tokens`)."""

    def __init__(self, levels: Levels) -> None:
        self.levels = levels
        self.lengths: list[int] = []
        self.gone: list[int] = []
        """Tokens of each row that were forgotten for good; those that are kept closed up."""
        self._floor: list[int] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.search: Tensor | None = None
        self._reserved = 0
        self.derived: dict[object, object] = {}
        """What policies made of the search keys, by its setting; forgotten when rows change other than by growing."""
        self.carried: dict[object, Carried] = {}
        """What policies keep of queries that are gone and cannot be made again; moves with the rows."""
        self.step: object = None
        """How one new token per row was read last, for the next one (`mgam.step`)."""
        self.steps: tuple[object, object, object] | None = None
        """By whom one new token per row may be read so, as the engine found."""

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, levels: Levels, lengths: Sequence[int] | None = None) -> Pyramid:
        """A pyramid over whole sequences (B, H, T, D), differentiable with respect to both."""
        pyramid = cls(levels)
        batch, _, tokens, _ = keys.shape
        pyramid.lengths = [tokens] * batch if lengths is None else list(lengths)
        if kernels.serve(keys) and keys.dtype == values.dtype and keys.stride(3) == values.stride(3) == 1:
            from mgam.pyramid_triton import summarised

            found = summarised(keys, values, levels, search_dtype(keys.dtype))
            pyramid.keys, pyramid.values, pyramid.search = found
            return pyramid
        pyramid.keys, pyramid.values = [keys], [values]
        for level in range(1, levels.top + 1):
            pyramid.keys.append(_means(pyramid.keys[-1], levels.ratio(level)))
            pyramid.values.append(_means(pyramid.values[-1], levels.ratio(level)))
        pyramid.search = _search_keys(keys, levels)
        return pyramid

    @property
    def tokens(self) -> int:
        """Tokens of the longest row."""
        return max(self.held, default=0)

    @property
    def held(self) -> list[int]:
        """Tokens of each row that are kept: all of them, unless some were evicted."""
        return [length - gone for length, gone in zip(self.lengths, self.gone or [0] * len(self.lengths), strict=True)]

    @property
    def room(self) -> int:
        """Tokens per row that fit without growing."""
        return self.keys[0].shape[2]

    @property
    def floor(self) -> list[int]:
        """The shortest length that each row can be cropped to."""
        return list(self._floor) or [0] * len(self.lengths)

    def chunks(self, row: Tensor, index: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, K*chunk, D) of the chunks `index` (N, H, K) in rows `row` (N,).

        Where an index is -1 they mean nothing but are numbers: those of token `spare` (N,).
        """
        chunk = self.levels.chunk
        token = (index[..., None] * chunk + torch.arange(chunk, device=index.device)).flatten(2)
        there = (index >= 0)[..., None].expand(*index.shape, chunk).flatten(2)
        token = torch.where(there, token, spare[:, None, None])
        return take(self.keys[0], row, token), take(self.values[0], row, token)

    def window(self, row: Tensor, start: Tensor, reach: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, reach, D) of the tokens from `start` (N,) on; beyond `last` (N,) they mean nothing."""
        token = torch.minimum(start[:, None] + torch.arange(reach, device=start.device), last[:, None])
        token = token[:, None].expand(-1, self.keys[0].shape[1], -1)
        return take(self.keys[0], row, token), take(self.values[0], row, token)

    def prefix(self, row: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, H, stop, D) of a row's first tokens."""
        return self.keys[0][row : row + 1, :, :stop], self.values[0][row : row + 1, :, :stop]

    def reserve(self, tokens: int) -> None:
        """Makes later appends up to `tokens` in all free of copying."""
        self._reserved = max(self._reserved, tokens)

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int] | None = None) -> None:
        """Adds the last `counts[b]` of the new states (B, H, n, D) to each row b (all of them by default).

        Summaries and search keys are made for chunks that become complete, always from the whole chunk: they are the
        same however the text was cut into calls.
        """
        batch, _, new, _ = keys.shape
        counts = [new] * batch if counts is None else list(counts)
        if not self.lengths:
            self.begin(keys)
        before = self.held
        self.grow(max(length + count for length, count in zip(before, counts, strict=True)))
        if len(set(before)) == 1 and set(counts) == {new}:
            self._write(slice(None), before[0], keys, values)
        elif new == 1 and set(counts) == {1}:
            self._write_each(before, keys, values)
        else:
            for row, count in enumerate(counts):
                if count:
                    span = slice(row, row + 1)
                    self._write(span, before[row], keys[span, :, new - count :], values[span, :, new - count :])

    def crop(self, remove: Sequence[int]) -> None:
        """Forgets the last `remove[b]` tokens of each row; chunks cut open are summarised again when they refill.

        Raises:
            SettingError: when what stood before them was evicted, so that they cannot be read anew.
        """
        lengths = [max(0, length - count) for length, count in zip(self.lengths, remove, strict=True)]
        if any(new < floor and new < old for new, floor, old in zip(lengths, self._floor, self.lengths, strict=False)):
            raise SettingError(
                f"a cache that evicted tokens cannot be taken back to {min(lengths)} tokens; read the text again, or "
                "use a method that keeps every token (assisted decoding needs one)"
            )
        self.lengths = lengths
        self.derived.clear()
        for kept in self.carried.values():
            kept.crop(self.lengths)

    def keep(self, places: Sequence[Tensor], floor: Sequence[int]) -> None:
        """Forgets all tokens of each row but those at `places[b]` (H or 1, n_b), sorted, and frees their memory.

        What is kept closes up: from then on token `t` stands at place `t - gone[b]`, and summaries are made of what is
        kept. `floor[b]`: the shortest length that the row can be cropped to afterwards.

        Raises:
            SettingError: when the tokens are not in memory.
        """
        if not self.in_memory:
            raise SettingError("a digest keeps every token; a method that evicts cannot read one")
        counts, states = [index.shape[1] for index in places], (self.keys[0], self.values[0])
        most, device = max(counts), states[0].device
        table = torch.stack(
            [
                index if count == most else pad(index, (most - count, 0))
                for index, count in zip(places, counts, strict=True)
            ]
        )
        index = (table if table.device == device else sent(table, device))[..., None]
        index = index.expand(-1, states[0].shape[1], -1, states[0].shape[3])
        fresh = Pyramid(self.levels)
        fresh.append(states[0].gather(2, index), states[1].gather(2, index), counts)
        self.keys, self.values, self.search, self._reserved = fresh.keys, fresh.values, fresh.search, 0
        self.gone = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        self._floor = list(floor)
        self.derived.clear()

    def select(self, rows: Tensor, shared: int = 0) -> None:
        """Keeps, repeats or reorders rows by index.

        `shared`: tokens in which every row equals the one that takes its place (beams share their prompt): they are not
        copied. It counts only where rows stay as many as they are, and nothing was evicted.
        """
        if rows.tolist() == list(range(len(self.lengths))):
            return
        index = rows.to(self.keys[0].device)
        self.derived.clear()
        for kept in self.carried.values():
            kept.select(rows)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.gone, self._floor = (
            [kept[row] for row in rows.tolist()] if kept else [] for kept in (self.gone, self._floor)
        )
        if shared and len(rows) == self.keys[0].shape[0] and not self.gone and self.search is not None:
            for level, size in enumerate(self.levels.sizes):
                span = slice(shared // size, self.tokens // size)
                for states in (self.keys[level], self.values[level]):
                    states[:, :, span] = states[:, :, span].index_select(0, index)
            span = slice(shared // self.levels.chunk, self.tokens // self.levels.chunk)
            self.search[:, :, :, span] = self.search[:, :, :, span].index_select(0, index)
            return
        self.keys = [states.index_select(0, index) for states in self.keys]
        self.values = [states.index_select(0, index) for states in self.values]
        if self.search is not None:
            self.search = self.search.index_select(0, index)

    def begin(self, like: Tensor) -> None:
        """Starts empty rows with the heads, number format and device of states (B, H, n, D)."""
        batch, heads, _, dim = like.shape
        self.lengths = [0] * batch
        none = like.new_empty(batch, heads, 0, dim)
        self.keys, self.values = ([none] * len(self.levels.sizes) for _ in range(2))
        self.search = like.new_empty(batch, heads, self.levels.search_per_chunk, 0, dim, dtype=search_dtype(like.dtype))

    def grow(self, tokens: int) -> None:
        """Makes room for `tokens` per row: in one step when reserved, else by a quarter at a time."""
        have = self.room
        if tokens <= have:
            return
        room = self._reserved if tokens <= self._reserved else max(tokens, have + have // 4, 256)
        chunk = self.levels.chunk
        room = -(-room // chunk) * chunk
        self._widen_tokens(room)
        used = [self.tokens // size for size in self.levels.sizes]
        for level, size in enumerate(self.levels.sizes[1:], start=1):
            self.keys[level] = _widen(self.keys[level], room // size, used[level], 2)
            self.values[level] = _widen(self.values[level], room // size, used[level], 2)
        assert self.search is not None
        self.search = _widen(self.search, room // chunk, used[1], 3)

    def _widen_tokens(self, room: int) -> None:
        for states in (self.keys, self.values):
            states[0] = _widen(states[0], room, self.tokens, 2)

    def put(self, rows: slice, before: int, keys: Tensor, values: Tensor) -> None:
        """Writes tokens from position `before` on, for which there is room; summaries stay as they are."""
        after = before + keys.shape[2]
        self.keys[0][rows, :, before:after] = keys
        self.values[0][rows, :, before:after] = values

    def complete(self, rows: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens of chunks [first, last)."""
        span = slice(first * self.levels.chunk, last * self.levels.chunk)
        return self.keys[0][rows, :, span], self.values[0][rows, :, span]

    def _write(self, rows: slice, before: int, keys: Tensor, values: Tensor) -> None:
        after = before + keys.shape[2]
        whole = self._whole(before, keys, values)
        if whole < keys.shape[2]:
            self.put(rows, before + whole, keys[:, :, whole:], values[:, :, whole:])
        for row in range(*rows.indices(len(self.lengths))):
            self.lengths[row] = after + (self.gone[row] if self.gone else 0)
        self._summarise(rows, before, after, (keys[:, :, :whole], values[:, :, :whole]) if whole else None)

    def _whole(self, before: int, keys: Tensor, values: Tensor) -> int:
        """How many of these new states (B, H, n, D) are copied while their chunks are summarised: whole chunks, by a
        kernel."""
        chunk, kept = self.levels.chunk, self.keys[0]
        if keys.shape[2] < chunk or before % chunk or not self.in_memory or not kernels.serve(keys):
            return 0
        plain = not (torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad))
        alike = keys.dtype == values.dtype == kept.dtype and keys.stride(3) == values.stride(3) == 1
        return keys.shape[2] // chunk * chunk if plain and alike else 0

    def _write_each(self, before: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """One new token (B, H, 1, D) for every row, which stand at different places."""
        row, place = sent(torch.tensor([list(range(len(before))), list(before)]), keys.device)
        self.keys[0][row, :, place] = keys[:, :, 0]
        self.values[0][row, :, place] = values[:, :, 0]
        self.lengths = [length + 1 for length in self.lengths]
        for number, old in enumerate(before):
            if not (old + 1) % self.levels.chunk:
                self._summarise(slice(number, number + 1), old, old + 1)

    def _summarise(self, rows: slice, before: int, after: int, new: tuple[Tensor, Tensor] | None = None) -> None:
        """Summaries and search keys of chunks that tokens [before, after) complete; `new`: keys and values of these
        chunks, where they are yet to be written."""
        for level in range(1, self.levels.top + 1):
            first, last = before // self.levels.sizes[level], after // self.levels.sizes[level]
            if last <= first:
                return
            if level == 1:
                self._build(rows, first, last, new)
                continue
            ratio = self.levels.ratio(level)
            for states in (self.keys, self.values):
                finer = states[level - 1][rows, :, first * ratio : last * ratio].unflatten(2, (-1, ratio))
                coarser = states[level][rows, :, first:last]
                if finer.requires_grad:
                    coarser.copy_(finer.mean(3))
                else:
                    torch.mean(finer, 3, out=coarser)

    def _build(self, rows: slice, first: int, last: int, new: tuple[Tensor, Tensor] | None) -> None:
        """Level 1 and search keys of chunks [first, last), of which the tokens `new` are written besides."""
        assert self.search is not None
        kept = self.complete(rows, first, last)
        keys, values = new or kept
        made = self.keys[1][rows, :, first:last], self.values[1][rows, :, first:last]
        search = self.search[rows, :, :, first:last]
        if kernels.serve(keys):
            from mgam.pyramid_triton import build

            build(keys, values, *made, search, self.levels, kept if new else None)
            return
        made[0].copy_(_means(keys, self.levels.chunk))
        made[1].copy_(_means(values, self.levels.chunk))
        search.copy_(_search_keys(keys, self.levels))


def take(states: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """states (B, H, n, D), row (N,), index (N, H, M) -> (N, H, M, D); index and result may be per query head, H*G."""
    heads = torch.arange(index.shape[1], device=states.device) // (index.shape[1] // states.shape[1])
    return states[row[:, None, None], heads[None, :, None], index]


def _means(states: Tensor, ratio: int) -> Tensor:
    """Means of `ratio` neighbours (B, H, n, D) -> (B, H, n // ratio, D); an incomplete rest is left out."""
    batch, heads, count, dim = states.shape
    whole = count // ratio
    return states[:, :, : whole * ratio].reshape(batch, heads, whole, ratio, dim).mean(3)


def _search_keys(keys: Tensor, levels: Levels) -> Tensor:
    """Search keys (B, H, S, C, D) of the complete chunks in keys (B, H, T, D)."""
    batch, heads, count, dim = keys.shape
    chunks = count // levels.chunk
    fine = _means(keys[:, :, : chunks * levels.chunk].detach(), levels.search)
    placed = fine.reshape(batch, heads, chunks, levels.search_per_chunk, dim).transpose(2, 3)
    return placed.to(search_dtype(keys.dtype)).contiguous()


def _widen(states: Tensor, room: int, used: int, axis: int) -> Tensor:
    """A larger buffer along `axis` that starts with the first `used` of the old one."""
    if room <= states.shape[axis]:
        return states
    shape = list(states.shape)
    shape[axis] = room
    wider = states.new_empty(shape)
    if used:
        wider.narrow(axis, 0, used).copy_(states.narrow(axis, 0, used))
    return wider

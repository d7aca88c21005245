"""What one call of the model holds: which columns are whose tokens. Masks and positions are checked here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mgam.errors import UnsupportedModelError


@dataclass(frozen=True)
class Call:
    """The new tokens of each text: `counts[n]` columns of row `row[n]` from `start[n]` on.

    With a cache a text is a row. Without one, a row may hold several packed texts.
    """

    row: tuple[int, ...]
    start: tuple[int, ...]
    counts: tuple[int, ...]
    rows: int
    columns: int

    @property
    def plain(self) -> bool:
        """Whether every text is a row that begins at its first column."""
        return self.row == tuple(range(self.rows)) and not any(self.start)

    def groups(self) -> list[list[int]]:
        """Texts of like length, so that a short one is not read at the length of a long one."""
        if len(self.row) == self.rows:
            return [list(range(self.rows))]
        found: dict[int, list[int]] = {}
        for number, count in enumerate(self.counts):
            found.setdefault(count.bit_length(), []).append(number)
        return list(found.values())

    def take(self, states: Tensor, texts: Sequence[int]) -> Tensor:
        """The texts (N, H, longest, D) of states (B, H, L, D), each from its first column on."""
        longest = max((self.counts[text] for text in texts), default=0)
        if self.plain:
            return states
        column = torch.tensor([self.start[text] for text in texts])[:, None] + torch.arange(longest)
        row = torch.tensor([self.row[text] for text in texts])[:, None]
        column = column.clamp(0, max(0, self.columns - 1))
        return states.transpose(1, 2)[row.to(states.device), column.to(states.device)].transpose(1, 2)

    def put(self, out: Tensor, got: Tensor, texts: Sequence[int]) -> None:
        """Writes texts (N, H, longest, D) back into their columns of `out` (B, H, L, D)."""
        number = torch.cat([torch.full((self.counts[text],), place) for place, text in enumerate(texts)])
        offset = torch.cat([torch.arange(self.counts[text]) for text in texts])
        column = torch.tensor([self.start[text] for text in texts])[number] + offset
        row = torch.tensor([self.row[text] for text in texts])[number]
        number, offset, column, row = (index.to(out.device) for index in (number, offset, column, row))
        out.transpose(1, 2).index_put_((row, column), got.transpose(1, 2)[number, offset])


def alone(
    mask: Tensor | None, positions: Tensor | None, borders: Tensor | None, rows: int, columns: int, ranked: bool
) -> Call:
    """A call without cache: training, or one pass over whole texts.

    Rows may be padded on either side. Without a mask, positions that do not go on by one begin another text of the same
    row (packing), as transformers has it. `borders`: cumulative lengths of texts packed in one row (`cu_seq_lens_q`).

    Raises:
        UnsupportedModelError: masks with holes, and, where entries stand at their ranks, positions that leave some out.
    """
    if borders is not None:
        if rows != 1 or mask is not None:
            raise UnsupportedModelError(
                f"cu_seq_lens_q with {rows} rows{'' if mask is None else ' and a mask'}: "
                "packed texts come in one row without mask"
            )
        edges = borders.tolist()
        return _packed([[(first, last) for first, last in pairwise(edges) if last > first]], rows, columns)
    if mask is not None:
        live = _live(mask, rows, columns, columns)
        start, counts = _spans(live)
        if ranked and positions is not None:
            _check_steps(positions, live)
        return Call(tuple(range(rows)), tuple(start), tuple(counts), rows, columns)
    if positions is not None and columns > 1:
        jumps = (positions.diff(dim=-1) != 1).cpu()
        if bool(jumps.any()):
            texts = []
            for row in jumps.expand(rows, -1):
                edges = [0, *(row.nonzero().flatten() + 1).tolist(), columns]
                texts.append(list(pairwise(edges)))
            return _packed(texts, rows, columns)
    return Call(tuple(range(rows)), (0,) * rows, (columns,) * rows, rows, columns)


def going_on(
    mask: Tensor | None, rows: int, columns: int, seen: int, before: Sequence[int], ahead: Sequence[int]
) -> tuple[Call, Tensor | None]:
    """A call with a cache that saw `seen` columns and holds `before[b]` tokens of row b.

    `ahead[b]` of them are from columns yet to come.
    Returns the call, and which of its columns are tokens (B, L), or None where all are.

    Raises:
        UnsupportedModelError: masks with holes, on the right, of another length, or at odds with what the cache holds.
    """
    if mask is None:
        counts = [columns - early for early in ahead]
        return Call(tuple(range(rows)), tuple(ahead), tuple(counts), rows, columns), None
    live = _live(mask, rows, columns, seen + columns)
    counts = _to_the_end(live[:, seen:])
    past = live[:, :seen].sum(1).tolist()
    for row, (marked, old, early) in enumerate(zip(past, before, ahead, strict=True)):
        if marked != old - early:
            raise UnsupportedModelError(
                f"the attention mask marks {marked} past tokens of row {row}, but the cache holds {old - early}; a "
                "mask must stay what it was for tokens that were read"
            )
    counts = [count - early for count, early in zip(counts, ahead, strict=True)]
    start = [columns - count for count in counts]
    return Call(tuple(range(rows)), tuple(start), tuple(counts), rows, columns), live[:, seen:]


def lengths_of(mask: Tensor, rows: int, columns: int) -> list[int]:
    """Tokens of each row of prompts (B, T) that a cache is to hold.

    Raises:
        UnsupportedModelError: masks with holes, on the right, or of another shape.
    """
    return _to_the_end(_live(mask, rows, columns, columns))


def check_positions(
    positions: Tensor, live: Tensor | None, call: Call, expected: Sequence[int | None]
) -> list[int | None]:
    """Refuses positions that do not go on by one; returns where each row's next token must stand.

    Raises:
        UnsupportedModelError: entries stand at their ranks, so that other positions would be passed over in silence.
    """
    placed = positions.cpu().expand(call.rows, -1)
    if live is not None:
        _check_steps(placed, live)
    elif call.columns > 1 and bool((placed.diff(dim=-1) != 1).any()):
        raise UnsupportedModelError(_JUMP)
    following: list[int | None] = []
    for row, (first, count, wanted) in enumerate(zip(call.start, call.counts, expected, strict=True)):
        if not count:
            following.append(wanted)
            continue
        if wanted is not None and int(placed[row, first]) != wanted:
            raise UnsupportedModelError(
                f"row {row} goes on at position {int(placed[row, first])} after {wanted - 1}: {_JUMP}"
            )
        following.append(int(placed[row, -1]) + 1)
    return following


_JUMP = (
    "position_ids must go on by one from token to token, since positions='granular' places entries by rank; leave "
    "position_ids out, give those of generate, or apply mgam with positions='absolute'"
)


def _check_steps(positions: Tensor, live: Tensor) -> None:
    steps = positions.cpu().expand(live.shape[0], -1).diff(dim=-1)
    if bool(((steps != 1) & live[:, 1:] & live[:, :-1]).any()):
        raise UnsupportedModelError(_JUMP)


def _live(mask: Tensor, rows: int, columns: int, wanted: int) -> Tensor:
    """Which tokens are real, (B, wanted)."""
    if mask.ndim != 2:
        raise UnsupportedModelError(
            f"an attention mask of shape {tuple(mask.shape)} was given; a mask of (rows, tokens) is needed"
        )
    if tuple(mask.shape) != (rows, wanted):
        raise UnsupportedModelError(
            f"an attention mask for {mask.shape[0]} rows of {mask.shape[1]} tokens was given; {rows} rows of {wanted} "
            f"tokens are read ({columns} of them new)"
        )
    return mask.to(torch.bool).cpu()


def _spans(live: Tensor) -> tuple[list[int], list[int]]:
    """First real column and number of real tokens of each row of (B, L)."""
    columns = live.shape[1]
    counts = live.sum(1)
    start = torch.where(counts > 0, live.to(torch.uint8).argmax(1), columns - counts)
    number = torch.arange(columns)
    whole = (number >= start[:, None]) & (number < (start + counts)[:, None])
    if not torch.equal(whole, live):
        raise UnsupportedModelError("the attention mask has holes; each row's real tokens must stand together")
    return start.tolist(), counts.tolist()


def _to_the_end(live: Tensor) -> list[int]:
    """Real tokens of each row of (B, L), which are its last."""
    columns = live.shape[1]
    start, counts = _spans(live)
    if any(offset + count != columns for offset, count in zip(start, counts, strict=True)):
        raise UnsupportedModelError(
            "the batch is padded on the right; with a cache, rows must be padded on the left "
            "(tokenizer.padding_side='left')"
        )
    return counts


def _packed(texts: list[list[tuple[int, int]]], rows: int, columns: int) -> Call:
    flat = [(row, first, last - first) for row, spans in enumerate(texts) for first, last in spans]
    return Call(
        tuple(row for row, _, _ in flat),
        tuple(first for _, first, _ in flat),
        tuple(count for _, _, count in flat),
        rows,
        columns,
    )

"""The search of `Scored` on the device: scores by one pass over the search keys, covers by sorted lists.

Nothing here waits for the device, and what is kept of all logits at a time is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mgam.chain_triton import chained
from mgam.cover import Cover, summaries_at_most
from mgam.kernels import at_once, cdiv, power_of_2
from mgam.levels import Levels
from mgam.policies.asked import Asked
from mgam.policies.cover_kernels import cover_kernel
from mgam.policies.search_kernels import (
    ask_kernel,
    few_kernel,
    logits_kernel,
    mass_kernel,
    project_kernel,
    split_kernel,
)

SELECT_AT_MOST = 1 << 15
"""Chunks that one program can rank."""
RANKED = 128, 256
"""Chunks that a warp ranks: of few blocks, and of many."""
LISTS = 4
"""Lists that one program can fill at once."""
POWERS = 1 << 29
"""Powers kept at a time, of two bytes."""
FEW = 16
"""Voters that one program can hear at once, as in decode."""
FEW_BLOCKS = 64
"""Blocks of which logits are written down whole, where they have few voters and are more than the rows."""


@dataclass(frozen=True)
class SearchTiles:
    """Rows and chunks of a tile, warps and pipeline stages."""

    rows: int = 128
    chunks: int = 128
    warps: int = 8
    stages: int = 4
    copies: bool = True
    registers: int | None = None


@dataclass(frozen=True)
class FewTiles:
    """Chunks of a tile, warps and pipeline stages where few voters are heard."""

    chunks: int = 64
    warps: int = 4
    stages: int = 4
    early: int = 4
    """Places of search keys that are loaded before voters are shortened, where there are at most `short` programs: with
    more of them others are at work in the meantime, and a program's registers count."""
    short: int = 256
    least: int = 128
    """Programs below which tiles are made smaller."""


FEW_TILES = FewTiles()


def scores(asked: Asked, chunks: int, tiles: SearchTiles | None = None, *, out: Tensor | None = None) -> Tensor:
    """Mass (N, H, chunks) that the voters give each chunk, float32; 0 for chunks that may not be judged.

    `chunks` are all that any voter may judge, or more. `out` (N, H, C), contiguous, C at least `chunks`, is where it is
    written, if given; then it is returned.
    """
    count, heads, voters, dim = asked.queries.shape
    found = out
    if found is None:
        found = torch.empty(count, heads, chunks, dtype=torch.float32, device=asked.queries.device)
    if not found.numel():
        return found
    if not chunks:
        return found.zero_()
    tiles = tiles or tiles_for(asked.queries.element_size())
    places = asked.search.shape[2]
    live = _bytes(asked.live)
    if few(count, voters, asked.search.shape[0]):
        logits, parts = _logits(asked, chunks)
        cut = parts.shape[-1]
        few_kernel[(cut * count * heads,)](
            logits, parts, live, found, count, heads, cut, chunks, found.shape[2],
            M=voters, V=live.shape[1], BLOCK_M=16, BLOCK_C=_few_chunks(chunks, count * heads), BLOCK_T=64, num_warps=4,
        )  # fmt: skip
        if found.shape[2] > chunks:
            found[..., chunks:].zero_()
        return found
    chunks = found.shape[2]
    factor = asked.factor
    assert factor is not None
    asked = replace(asked, row=asked.row.contiguous(), visible=asked.visible.contiguous())
    steps = asked.search.stride()[:4]
    width = max(16, power_of_2(dim))
    copies = tiles.copies and _copyable(asked.search) and dim == width
    desc: Tensor | TensorDescriptor = asked.search
    if copies:
        shape = [1, 1, 1, tiles.chunks, width]
        desc = TensorDescriptor(asked.search, list(asked.search.shape), list(asked.search.stride()), shape)
    # Blocks of one row share a tile; in a batch they stand in turn, a row each.
    together = max(1, tiles.rows // voters) if asked.search.shape[0] == 1 else 1
    row_tiles, cuts = cdiv(together * voters, tiles.rows), cdiv(chunks, tiles.chunks)
    most = max(1, POWERS // (heads * voters * chunks * together))
    step = together * at_once(cdiv(count, together), most, heads * row_tiles, 2, found.device)
    powers = torch.empty(step, heads, voters, cuts * tiles.chunks, dtype=torch.float16, device=found.device)
    shares = torch.empty(step, heads, voters, cuts, dtype=torch.float32, device=found.device)
    for first in range(0, count, step):
        some = slice(first, min(first + step, count))
        blocks = some.stop - first
        visible = asked.visible[some]
        ask_kernel[(row_tiles * cdiv(blocks, together) * heads,)](
            asked.queries[some], factor[some], powers, shares, asked.search, asked.row[some], visible, live[some],
            blocks, heads, row_tiles, chunks, cuts, *steps, desc,
            TOGETHER=together, M=voters, V=live.shape[1], S=places, D=dim, BLOCK_M=tiles.rows, BLOCK_C=tiles.chunks,
            BLOCK_D=width, COPY=copies, num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
        )  # fmt: skip
        wide = cdiv(chunks, 512)
        mass_kernel[(wide * blocks * heads,)](
            powers, shares, visible, found[some], heads, wide, chunks, cuts,
            M=voters, BLOCK_M=2, BLOCK_C=512, CUT=tiles.chunks, num_warps=4,
        )  # fmt: skip
    return found


def few(blocks: int, voters: int, rows: int) -> bool:
    """Whether logits are written down: those of one new token a row, or of a question, and not those of a text."""
    return voters <= FEW and blocks <= max(rows, FEW_BLOCKS)


def _few_chunks(chunks: int, pairs: int) -> int:
    """Chunks of a tile for so many blocks and heads: fewer where that gives a multiprocessor something to do."""
    each = FEW_TILES.chunks
    while each > 16 and cdiv(chunks, each) * pairs < FEW_TILES.least:
        each //= 2
    return each


def _bytes(live: Tensor) -> Tensor:
    return (live if live.is_contiguous() else live.contiguous()).view(torch.uint8)


def _logits(asked: Asked, chunks: int) -> tuple[Tensor, Tensor]:
    """Logits (N, H, M, chunks) of few voters, and the parts of their normalisers (2, N, H, M, tiles). The first kernel
    of a search of one new token per row, whose tables it writes."""
    count, heads, voters, dim = asked.queries.shape
    device = asked.queries.device
    logits = torch.empty(count, heads, voters, chunks, dtype=torch.float32, device=device)
    tiles, places, each = FEW_TILES, asked.search.shape[2], _few_chunks(chunks, count * heads)
    cut = cdiv(chunks, each)
    parts = torch.empty(2, count, heads, voters, cut, dtype=torch.float32, device=device)
    wide, short = (0, dim) if asked.basis is None else (dim, asked.search.shape[-1])
    basis = asked.search if asked.basis is None else asked.basis.contiguous()
    factor = asked.queries if asked.factor is None else asked.factor
    early = min(tiles.early, places) if wide and cut * count * heads <= tiles.short else 0
    now = asked.now
    tables = (parts, parts, parts, parts) if now is None else (now.lengths, now.table, now.live, now.tickets)
    logits_kernel[(cut * count * heads,)](
        asked.queries.contiguous(), factor.contiguous(), logits, parts, asked.search, asked.row.contiguous(),
        asked.visible.contiguous(), basis, count, heads, cut, chunks, *asked.search.stride()[:4], asked.scale,
        *tables, M=voters, S=places, D=short, BLOCK_M=16, BLOCK_C=each, BLOCK_D=_block(short), WIDE=wide,
        BLOCK_W=_block(dim), MOST=224.0, NOW=now is not None, WINDOW=now.window if now else 0,
        CHUNK=now.levels.chunk if now else 1, EARLY=early, ALIKE=asked.factor is None, num_warps=tiles.warps,
        num_stages=tiles.stages, **chained(now is not None, device),
    )  # fmt: skip
    return logits, parts


def shorten_queries(queries: Tensor, row: Tensor, basis: Tensor, step: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Voters (N, H*G, V, D) in the basis (B, H, D, d), eight bits a number; and factors (N, H, G*V) that hold
    `scale`."""
    count, query_heads, votes, dim = queries.shape
    heads, width = basis.shape[1], basis.shape[3]
    voters = query_heads // heads * votes
    short = torch.empty(count, heads, voters, width, dtype=torch.float8_e4m3fn, device=queries.device)
    factor = torch.empty(count, heads, voters, dtype=torch.float32, device=queries.device)
    tiles = cdiv(voters, 128)
    if count:
        project_kernel[(tiles * count * heads,)](
            queries, basis.contiguous(), basis, step.contiguous(), short, factor, row.contiguous(), heads, tiles, scale,
            queries.stride(0), 0, queries.stride(1), queries.stride(2), short.stride(0), 0, short.stride(1),
            short.stride(2), voters, V=votes, PLACES=1, GROUPED=True, D=dim, SHORT=width, BLOCK_M=128,
            BLOCK_D=_block(dim), BLOCK_S=_block(width), BY_ROW=True, MOST=224.0, num_warps=8,
        )  # fmt: skip
    return short, factor


def shorten_keys(keys: Tensor, basis: Tensor, offset: Tensor, step: Tensor, short: Tensor | None = None) -> Tensor:
    """Search keys (B, H, S, n, D) in the basis (B, H, D, d), less their mean there, the offset (B, H, d), in steps
    (B, H), eight bits a number; written to `short` (B, H, S, n, d), by any strides but the last, where it is given."""
    batch, heads, places, count, dim = keys.shape
    width = basis.shape[3]
    if short is None:
        short = torch.empty(*keys.shape[:4], width, dtype=torch.float8_e4m3fn, device=keys.device)
    tiles = cdiv(count, 128)
    if count:
        project_kernel[(tiles * batch * places * heads,)](
            keys, basis.contiguous(), offset.contiguous(), step.contiguous(), short, short, offset, heads, tiles, 1.0,
            keys.stride(0), keys.stride(2), keys.stride(1), keys.stride(3), short.stride(0), short.stride(2),
            short.stride(1), short.stride(3), count, V=1, PLACES=places, GROUPED=False, D=dim, SHORT=width, BLOCK_M=128,
            BLOCK_D=_block(dim), BLOCK_S=_block(width), BY_ROW=False, MOST=224.0, num_warps=8,
        )  # fmt: skip
    return short


def _block(width: int) -> int:
    return max(16, power_of_2(width))


def tiles_for(bytes_each: int) -> SearchTiles:
    """Tiles found on an H200."""
    return SearchTiles(64, 128, 4, 4) if bytes_each == 1 else SearchTiles(64, 64, 4, 3)


def cover(
    found: Tensor, start: Tensor, levels: Levels, most: int, *, rest: str = "summaries", mass: float = 1.0
) -> Cover:
    """The cover that opens the sink and the `most` best of the chunks between sink and window.

    Shapes: found (N, H, C) as from `scores`, start (N,) first token of the window. The lists come out sorted, and in
    whole sixteens, so that a kernel need not be compiled anew for every width.
    """
    count, heads, chunks = found.shape
    device = found.device
    most = min(most, max(chunks - 1, 0))
    if _at_once_serves(chunks, most, levels) and found.stride(2) == 1 and found.stride(0) == heads * found.stride(1):
        return _at_once(found, found.stride(1), None, chunks, start, levels, most, rest, mass)
    number = torch.arange(chunks, device=device)
    allowed = (number > 0) & ((number + 1) * levels.chunk <= start[:, None])
    value, best = found.masked_fill(~allowed[:, None], -1.0).topk(most, -1)
    far = torch.iinfo(torch.int64).max
    sink = torch.where(start > 0, 0, far)[:, None, None].expand(count, heads, 1)
    chosen = torch.cat((sink, best.masked_fill(value < 0, far)), -1).sort(-1).values
    opened = torch.nn.functional.pad(chosen.masked_fill(chosen == far, -1), (0, _wide(1 + most) - 1 - most), value=-1)
    return Cover(levels, start, opened, summaries(opened, start, levels, chunks, rest), mass)


def cover_of(
    asked: Asked, chunks: int, start: Tensor, levels: Levels, most: int, *, rest: str = "summaries", mass: float = 1.0
) -> Cover:
    """`cover` of what `scores` finds in the first `chunks` chunks, all that any voter may judge; for few voters without
    writing it down."""
    best = min(most, max(chunks - 1, 0))
    count, _, voters, _ = asked.queries.shape
    if few(count, voters, asked.search.shape[0]) and _at_once_serves(chunks, best, levels):
        logits, parts = _logits(asked, chunks)
        return _at_once(logits, chunks, (parts, _bytes(asked.live)), chunks, start, levels, best, rest, mass)
    return cover(scores(asked, chunks), start, levels, most, rest=rest, mass=mass)


def _at_once_serves(chunks: int, most: int, levels: Levels) -> bool:
    ratios = [size // levels.chunk for size in levels.sizes[1:]]
    some = chunks > 0 and most > 0 and levels.top < LISTS
    return some and max(chunks, *ratios) <= SELECT_AT_MOST and not any(ratio & (ratio - 1) for ratio in ratios)


def _at_once(
    found: Tensor,
    width: int,
    voters: tuple[Tensor, Tensor] | None,
    chunks: int,
    start: Tensor,
    levels: Levels,
    most: int,
    rest: str,
    mass: float,
) -> Cover:
    """A cover in one launch, counts and ranks included, from scores (N, H, width) or, where `voters` gives parts and
    who is live, from logits (N, H, M, width)."""
    count, heads = found.shape[:2]
    whole = rest != "drop"
    limits = summaries_at_most(chunks, _wide(1 + most), levels) if whole else [0] * levels.top
    rooms = [_wide(1 + most), *map(_wide, limits)]
    sizes = [count * heads * room for room in rooms]
    lists, ranks = torch.empty(2, sum(sizes), dtype=torch.int64, device=found.device)
    counts = torch.empty(count, heads, 1 + levels.top, dtype=torch.int32, device=found.device)
    ratios = tuple(size // levels.chunk for size in levels.sizes[1:])
    fields = (0, *accumulate(room.bit_length() for room in rooms))
    size = max(64, ratios[-1], power_of_2(chunks))
    parts, live = voters or (found, found)
    tiles, m = (parts.shape[-1], found.shape[2]) if voters else (1, 0)
    cover_kernel[(count * heads,)](
        found, parts, live, start.contiguous(), lists, ranks, counts, count * heads, heads, chunks, width, most,
        tuple(rooms), tiles,
        M=m, V=live.shape[1], BLOCK_T=max(16, power_of_2(tiles)), BLOCK_M=min(4, power_of_2(m)),
        CHUNK=levels.chunk, TOP=levels.top, RATIOS=ratios, FIELDS=fields, WIDE=fields[-1] > 31,
        FAR=sum(sizes) >= 1 << 31, REST=whole, BLOCK=size, BLOCK_K=power_of_2(max(rooms)),
        num_warps=max(1, min(16, size // RANKED[voters is None])), **chained(voters is not None, found.device),
    )  # fmt: skip
    index, places = (
        tuple(part.view(count, heads, room) for part, room in zip(whole.split(sizes), rooms, strict=True))
        for whole in (lists, ranks)
    )
    return Cover(levels, start, index[0], index[1:], mass, placed=(counts, places))


def most_entries(chunks: int, most: int, levels: Levels, rest: str = "summaries") -> int:
    """Bound of the entries before a window in a `cover` of `chunks` chunks, of which `most` and the sink are opened."""
    opened = min(most + 1, chunks)
    return opened * levels.chunk + (sum(summaries_at_most(chunks, opened, levels)) if rest == "summaries" else 0)


def summaries(
    opened: Tensor, start: Tensor, levels: Levels, chunks: int, rest: str = "summaries"
) -> tuple[Tensor, ...]:
    """Sorted lists, per level 1 and up, of the summaries that complete a partition (`mgam.cover.refine`)."""
    count, heads, width = opened.shape
    if rest == "drop" or not chunks:
        return (torch.empty(count, heads, 0, dtype=torch.int64, device=opened.device),) * levels.top
    rooms = [_wide(room) for room in summaries_at_most(chunks, width, levels)]
    found = tuple(torch.empty(count, heads, room, dtype=torch.int64, device=opened.device) for room in rooms)
    split_kernel[(count * heads, levels.top)](
        opened, start.contiguous(), found, heads, width, tuple(rooms), levels.sizes[1:], CHUNK=levels.chunk,
        TOP=levels.top, BLOCK_K=max(2, power_of_2(width)), BLOCK=128, num_warps=4,
    )  # fmt: skip
    return found


def _wide(count: int) -> int:
    """Room for a list: whole sixteens."""
    return -(-count // 16) * 16


def _copyable(search: Tensor) -> bool:
    if search.is_cuda and torch.cuda.get_device_capability(search.device) < (9, 0):
        return False
    size = search.element_size()
    return (
        search.stride(4) == 1
        and all(step * size % 16 == 0 for step in search.stride()[:4])
        and search.data_ptr() % 16 == 0
    )

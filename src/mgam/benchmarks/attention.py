"""Attention alone: prefill, forward and backward, decode; build, search and read apart; against peers in the same
run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgam.attend.triton.autograd import Read
from mgam.attend.triton.forward import Turn, read
from mgam.attend.triton.lists import Lists
from mgam.benchmarks.machine import Machine, Timing, graphed, timed
from mgam.cover import Cover, dense_cover
from mgam.device import choose, decode, prefill
from mgam.levels import Levels
from mgam.policies import Scored
from mgam.policies.compact import Compact, CompactKeys
from mgam.policies.fixed import Window
from mgam.positions import Positions, Rotary
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

PEERS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
DENSE_AT_MOST = 1 << 18
"""Longest text that dense attention is timed at; beyond it the quadratic law says the rest, and the row says so."""


@dataclass(frozen=True)
class Setting:
    """The shape and the method that are timed."""

    query_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    block: int = 128
    budget: int = 2048
    window: int = 512
    sizes: tuple[int, ...] = (1, 64, 1024)
    every: int = 2
    dims: int = 64
    bits: int = 8
    positions: str = "granular"
    dtype: torch.dtype = torch.bfloat16

    @property
    def policy(self) -> Scored:
        compact = None
        if self.dims < self.dim or self.bits == 8:
            compact = Compact(self.dims, 8 if self.bits == 8 else 16)
        return Scored(self.budget, self.window, every=self.every, compact=compact)

    @property
    def levels(self) -> Levels:
        return Levels(self.sizes)

    @property
    def placed(self) -> Positions:
        if self.positions == "absolute":
            return Positions()
        return Positions.granular(Rotary.plain(self.dim, 32768), self.window + self.block + self.sizes[1])


@dataclass(frozen=True)
class Row:
    """One figure. `part`: what of the work; `kernel`: what really ran; entries: read per query, 0 where that has no
    meaning."""

    phase: str
    part: str
    kernel: str
    tokens: int
    batch: int
    ms: float
    fastest: float
    slowest: float
    repeats: int
    entries: float = 0.0
    tflops: float = 0.0
    matmul_share: float = 0.0
    gbs: float = 0.0
    copy_share: float = 0.0
    memory_gb: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, str | float | int]:
        return asdict(self)


def _row(phase: str, part: str, kernel: str, tokens: int, batch: int, time: Timing, note: str = "") -> Row:
    return Row(phase, part, kernel, tokens, batch, time.median, time.fastest, time.slowest, time.repeats, note=note)


def _rated(row: Row, machine: Machine, flop: float, moved: float, entries: float = 0.0) -> Row:
    """Adds rates on `flop` operations and `moved` bytes, and their shares of the machine's ceilings."""
    tflops, gbs = flop / row.ms / 1e9, moved / row.ms / 1e6
    return replace(
        row,
        entries=entries,
        tflops=tflops,
        matmul_share=tflops / machine.matmul,
        gbs=gbs,
        copy_share=gbs / machine.copy,
    )


def states(setting: Setting, tokens: int, batch: int = 1, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries (B, Hq, Q, D), keys and values (B, H, T, D)."""
    made = [
        torch.randn(batch, heads, count, setting.dim, device="cuda", dtype=setting.dtype)
        for heads, count in (
            (setting.query_heads, queries or tokens),
            (setting.kv_heads, tokens),
            (setting.kv_heads, tokens),
        )
    ]
    return made[0], made[1], made[2]


def built(setting: Setting, keys: Tensor, values: Tensor) -> Pyramid:
    """A pyramid made by one append, as a cache makes it."""
    pyramid = Pyramid(setting.levels)
    pyramid.reserve(keys.shape[2])
    pyramid.append(keys, values)
    return pyramid


def blocks_of(tokens: int, block: int) -> Blocks:
    """Whole blocks of a text that is read for the first time."""
    count = tokens // block
    start = torch.arange(count) * block
    zero, length = torch.zeros(count, dtype=torch.int64), torch.full((count,), block)
    return Blocks(zero, start, length, start, start, start + block, block, block)


def in_blocks(queries: Tensor, block: int) -> Tensor:
    """Queries (1, Hq, T, D) as blocks (N, Hq, Q, D), a view."""
    return queries[0].unflatten(1, (-1, block)).transpose(0, 1)


def prefill_rows(setting: Setting, machine: Machine, tokens: int, parts: bool = True) -> Iterator[Row]:
    """Build, search, read and the whole, over one text."""
    queries, keys, values = states(setting, tokens)
    scale = setting.dim**-0.5
    policy, positions = setting.policy, setting.placed
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def whole() -> Tensor:
        return prefill(queries, built(setting, keys, values), policy, positions, scale, block=setting.block)

    whole()
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9
    row = _row("prefill", "build + search + read", "mgam triton", tokens, 1, timed(whole))
    yield replace(row, memory_gb=memory)
    if not parts:
        return
    kv_bytes = 2 * keys.numel() * keys.element_size()
    time = timed(lambda: built(setting, keys, values))
    yield _rated(
        _row("prefill", "build", "mgam triton, copy into the cache included", tokens, 1, time), machine, 0, 2 * kv_bytes
    )
    pyramid = built(setting, keys, values)
    if policy.compact is not None:

        def shorten() -> None:
            pyramid.derived.clear()
            CompactKeys.of(pyramid, pyramid.levels, policy.compact)  # type: ignore[arg-type]

        yield _row("prefill", "compact keys", "torch", tokens, 1, timed(shorten))
    blocks, cut = blocks_of(tokens, setting.block), in_blocks(queries, setting.block)
    step = max(1, (1 << 26) // (setting.kv_heads * max(1, tokens // setting.sizes[1])))
    pieces = [slice(first, min(first + step, len(blocks))) for first in range(0, len(blocks), step)]
    time = timed(lambda: [choose(cut[piece], blocks[piece], pyramid, policy) for piece in pieces])
    width = setting.dims if policy.compact else setting.dim
    flop = 2 * setting.query_heads * (tokens / setting.every) * (tokens / 8) * width
    name = f"mgam triton, every {setting.every}, {width} dims, {setting.bits} bits"
    yield _rated(_row("prefill", "search", name, tokens, 1, time, "rate on one pass of products"), machine, flop, 0)
    covers = [choose(cut[piece], blocks[piece], pyramid, policy) for piece in pieces]
    device = queries.device
    time = timed(lambda: [Lists.of(c, blocks[p], device, positions) for c, p in zip(covers, pieces, strict=True)])
    yield _row("prefill", "lists and ranks", "torch", tokens, 1, time)
    yield _read_row(setting, machine, tokens, cut, pyramid, blocks, pieces, policy)


def _read_row(
    setting: Setting,
    machine: Machine,
    tokens: int,
    cut: Tensor,
    pyramid: Pyramid,
    blocks: Blocks,
    pieces: list[slice],
    policy: Scored,
) -> Row:
    covers = [choose(cut[piece], blocks[piece], pyramid, policy) for piece in pieces]
    return read_row(setting, machine, tokens, cut, pyramid, blocks, list(zip(pieces, covers, strict=True)), "read")


def read_row(
    setting: Setting,
    machine: Machine,
    tokens: int,
    cut: Tensor,
    pyramid: Pyramid,
    blocks: Blocks,
    covers: list[tuple[slice, Cover]],
    part: str,
) -> Row:
    """Reading given covers."""
    positions = setting.placed
    lists = [(piece, Lists.of(cover, blocks[piece], cut.device, positions)) for piece, cover in covers]
    out = torch.empty_like(cut)

    def call() -> None:
        for piece, found in lists:
            turn = Turn.of(positions, found, pyramid.tokens, cut.device)
            read(cut[piece], found, pyramid.keys, pyramid.values, setting.dim**-0.5, turn=turn, out=out[piece])

    entries = sum(sum(cover.entries_per_level(blocks[piece])) for piece, cover in covers)
    flop = 4 * setting.dim * setting.query_heads * entries
    row = _row("prefill", part, f"mgam triton, {setting.positions} positions", tokens, 1, timed(call))
    return _rated(row, machine, flop, 0, entries / tokens)


def window_row(setting: Setting, machine: Machine, tokens: int) -> Row:
    """Sink and window alone: nothing that reads them can be faster."""
    queries, keys, values = states(setting, tokens)
    pyramid = built(setting, keys, values)
    blocks = blocks_of(tokens, setting.block)
    cover = Window(setting.window).choose(None, blocks, pyramid, setting.levels)
    return read_row(
        setting,
        machine,
        tokens,
        in_blocks(queries, setting.block),
        pyramid,
        blocks,
        [(slice(0, len(blocks)), cover)],
        "window, lower bound",
    )


def dense_rows(setting: Setting, machine: Machine, tokens: int, backward: bool = False) -> Iterator[Row]:
    """Dense causal attention of PyTorch."""
    phase = "forward + backward" if backward else "prefill"
    timed_at = min(tokens, DENSE_AT_MOST if not backward else DENSE_AT_MOST // 2)
    queries, keys, values = states(setting, timed_at)
    for states_ in (queries, keys, values):
        states_.requires_grad_(backward)
    pull = torch.randn_like(queries) if backward else None
    for name, peer in PEERS.items():

        def call(peer: SDPBackend = peer) -> None:
            with sdpa_kernel(peer):
                out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            if pull is not None:
                torch.autograd.grad(out, (queries, keys, values), pull)

        try:
            time = timed(call, least=2 if timed_at > 1 << 16 else 5)
        except RuntimeError as error:
            yield Row(
                phase,
                "dense",
                name,
                tokens,
                1,
                float("nan"),
                0,
                0,
                0,
                note=f"refused: {str(error).splitlines()[0][:120]}",
            )
            continue
        more = (tokens / timed_at) ** 2
        time = Timing(time.median * more, time.fastest * more, time.slowest * more, time.repeats)
        note = "" if more == 1 else f"extrapolated from {timed_at} tokens"
        flop = 4 * setting.dim * setting.query_heads * tokens * (tokens + 1) / 2 * (3.5 if backward else 1)
        yield _rated(_row(phase, "dense", name, tokens, 1, time, note), machine, flop, 0, (tokens + 1) / 2)


def training_rows(setting: Setting, machine: Machine, tokens: int) -> Iterator[Row]:
    """Build, search, read, and gradients of queries, keys and values."""
    queries, keys, values = states(setting, tokens)
    policy, positions, scale = setting.policy, setting.placed, setting.dim**-0.5
    blocks = blocks_of(tokens, setting.block)
    for states_ in (queries, keys, values):
        states_.requires_grad_(True)
    pull = torch.randn_like(in_blocks(queries, setting.block))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def call() -> None:
        pyramid = Pyramid.of(keys, values, setting.levels)
        cut = in_blocks(queries, setting.block)
        with torch.no_grad():
            cover = choose(cut, blocks, pyramid, policy)
            lists = Lists.of(cover, blocks, cut.device, positions)
        turn = Turn.of(positions, lists, tokens, cut.device)
        out = Read.apply(cut, lists, turn, scale, None, *pyramid.keys, *pyramid.values)
        torch.autograd.grad(out, (queries, keys, values), pull)

    call()
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9
    row = _row("forward + backward", "build + search + read", "mgam triton", tokens, 1, timed(call, least=3))
    yield replace(row, memory_gb=memory)


def decode_rows(setting: Setting, machine: Machine, tokens: int, batch: int) -> Iterator[Row]:
    """One new token per row, captured in a CUDA graph, rows of slightly different lengths."""
    queries, keys, values = states(setting, tokens, batch, 1)
    pyramid = built(setting, keys, values)
    policy, positions, scale = setting.policy, setting.placed, setting.dim**-0.5
    if policy.compact is not None:
        CompactKeys.of(pyramid, pyramid.levels, policy.compact)
    chunks = tokens // setting.sizes[1]
    lengths = torch.tensor([tokens - 7 * row for row in range(batch)], device="cuda")
    entry = 2 * setting.dim * 2 * setting.kv_heads

    def call() -> Tensor:
        return decode(queries, lengths, pyramid, policy, positions, scale, chunks=chunks)

    time = timed(graphed(call), most=200)
    yield _row("decode", "search + read", "mgam triton, CUDA graph", tokens, batch, time)
    blocks = Blocks(
        torch.arange(batch),
        lengths.cpu() - 1,
        torch.ones(batch, dtype=torch.int64),
        lengths.cpu() - 1,
        lengths.cpu() - 1,
        lengths.cpu(),
        1,
        1,
    )
    covers = {"dense": dense_cover(blocks, setting.kv_heads, setting.levels, queries.device)}
    if tokens > 4 * setting.budget:
        covers["read"] = _decode_cover(queries, lengths, blocks, pyramid, policy, chunks)
    for part, cover in covers.items():
        place = positions if part == "read" else Positions()
        lists = Lists.of(cover, blocks, queries.device, place)
        turn = Turn.of(place, lists, tokens, queries.device, queries.dtype)
        time = timed(
            graphed(partial(read, queries, lists, pyramid.keys, pyramid.values, scale, turn=turn)),
            most=200,
        )
        entries = sum(cover.entries_per_level(blocks))
        row = _row("decode", part, "mgam triton, CUDA graph", tokens, batch, time)
        yield _rated(row, machine, 4 * setting.dim * setting.query_heads * entries, entries * entry, entries / batch)
    folded = queries.view(batch, setting.kv_heads, -1, setting.dim)
    for name, peer in PEERS.items():

        def dense(peer: SDPBackend = peer) -> Tensor:
            with sdpa_kernel(peer):
                return F.scaled_dot_product_attention(folded, keys, values)

        try:
            time = timed(graphed(dense), most=100)
        except RuntimeError as error:
            yield Row(
                "decode",
                "dense",
                name,
                tokens,
                batch,
                float("nan"),
                0,
                0,
                0,
                note=f"refused: {str(error).splitlines()[0][:120]}",
            )
            continue
        entries = float(tokens * batch)
        yield _rated(_row("decode", "dense", name, tokens, batch, time), machine, 0, entries * entry, float(tokens))


def _decode_cover(
    queries: Tensor, lengths: Tensor, blocks: Blocks, pyramid: Pyramid, policy: Scored, chunks: int
) -> Cover:
    from mgam.cover import window_start
    from mgam.device import _asked
    from mgam.policies.search_triton import cover, scores

    start = window_start(lengths - 1, policy.window, pyramid.levels)
    rows = torch.arange(len(blocks), device=queries.device)
    live = torch.ones(len(blocks), 1, dtype=torch.bool, device=queries.device)
    asked = _asked(queries, live, rows, (lengths - 1) // pyramid.levels.chunk, pyramid, policy, short=True)
    return cover(scores(asked, chunks), start, pyramid.levels, policy.budget // pyramid.levels.chunk)


def flex_row(setting: Setting, machine: Machine, tokens: int) -> Row:
    """FlexAttention over the blocks that the same search opened, with sink and window, without summaries."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    queries, keys, values = states(setting, tokens)
    pyramid = built(setting, keys, values)
    blocks, cut = blocks_of(tokens, setting.block), in_blocks(queries, setting.block)
    policy = replace(setting.policy, rest="drop")
    cover = choose(cut, blocks, pyramid, policy)
    chunk = setting.sizes[1]
    first, last = cover.window_start // chunk, ((blocks.stop - 1) // chunk).to(queries.device)
    near = first[:, None] + torch.arange(int((last - first).max()) + 1, device=queries.device)
    near = near.masked_fill(near > last[:, None], -1)[:, None].expand(-1, setting.kv_heads, -1)
    listed = torch.cat((cover.opened, near), -1)
    order = torch.where(listed < 0, 1 << 40, listed).sort(-1).values
    count = (listed >= 0).sum(-1, dtype=torch.int32)
    group = setting.query_heads // setting.kv_heads
    spread = torch.zeros(len(blocks), setting.kv_heads, tokens // chunk, dtype=torch.int32, device=queries.device)
    spread[..., : order.shape[-1]] = order.clamp_max(tokens // chunk - 1)
    index = spread.transpose(0, 1).repeat_interleave(group, 0)[None].contiguous()
    number = count.transpose(0, 1).repeat_interleave(group, 0)[None].contiguous()

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = BlockMask.from_kv_blocks(
        number, index, BLOCK_SIZE=(setting.block, chunk), mask_mod=causal, compute_q_blocks=False
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    time = timed(lambda: compiled(queries, keys, values, block_mask=mask, enable_gqa=True))
    entries = sum(cover.entries_per_level(blocks))
    row = _row("prefill", "read, same blocks, rest dropped", "FlexAttention", tokens, 1, time, "selection not included")
    return _rated(row, machine, 4 * setting.dim * setting.query_heads * entries, 0, entries / tokens)


def same_blocks_row(setting: Setting, machine: Machine, tokens: int) -> Row:
    """The read kernel over exactly what FlexAttention is given."""
    queries, keys, values = states(setting, tokens)
    pyramid = built(setting, keys, values)
    blocks, cut = blocks_of(tokens, setting.block), in_blocks(queries, setting.block)
    cover = choose(cut, blocks, pyramid, replace(setting.policy, rest="drop"))
    plain = replace(setting, positions="absolute")
    part = "read, same blocks, rest dropped"
    return read_row(plain, machine, tokens, cut, pyramid, blocks, [(slice(0, len(blocks)), cover)], part)


def quest_row(setting: Setting, machine: Machine, tokens: int, batch: int, page: int = 16) -> Row:
    """A Quest-like selection at decode (Tang et al. 2024, arXiv 2406.10774): pages by the bound of their keys'
    minima and maxima."""
    queries, keys, values = states(setting, tokens, batch, 1)
    levels = Levels((1, page), 1)
    paged = keys.unflatten(2, (-1, page))
    low, high = paged.amin(3), paged.amax(3)
    pyramid = Pyramid.of(keys, values, levels)
    folded = queries.view(batch, setting.kv_heads, -1, setting.dim)
    most = (setting.budget + setting.window) // page
    ends = torch.full((batch,), tokens - 1, device="cuda")

    def call() -> Tensor:
        bound = folded.clamp_min(0) @ high.transpose(2, 3) + folded.clamp_max(0) @ low.transpose(2, 3)
        best = bound.amax(2)[..., :-1].topk(most, -1).indices.sort(-1).values
        start = ends // page * page
        none = best[..., :0]
        table = torch.stack((torch.arange(batch, device="cuda"), ends, torch.ones_like(ends), start))
        counts = torch.stack((torch.full_like(best[..., 0], most), torch.zeros_like(best[..., 0])), -1).int()
        lists = Lists(levels, table, 1, (best, none), counts, (best, none), False)
        turn = Turn.of(Positions(), lists, tokens, queries.device, queries.dtype)
        return read(queries, lists, pyramid.keys, pyramid.values, setting.dim**-0.5, turn=turn).out

    time = timed(graphed(call), most=100)
    return _row("decode", "search + read", f"Quest-like, pages of {page}, read by mgam triton", tokens, batch, time)


def guarded(what: str, make: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a part, or one row that says why there are none."""
    try:
        yield from make()
    except Exception as error:  # a benchmark reports what failed and goes on
        yield Row(what, "failed", "", 0, 0, float("nan"), 0, 0, 0, note=f"{type(error).__name__}: {str(error)[:300]}")
    torch.cuda.empty_cache()

"""Peers that select: FlexAttention over the same blocks, and pages chosen as Quest does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mgam.attend.triton.forward import read
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import Turn
from mgam.benchmarks.machine import Machine, graphed, timed
from mgam.benchmarks.prefill import read_row
from mgam.benchmarks.setting import Row, Setting, blocks_of, built, chosen, in_blocks, rated, row_of, states
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.positions import Positions
from mgam.pyramid import Pyramid


def flex_row(setting: Setting, machine: Machine, tokens: int) -> Row:
    """FlexAttention over the blocks that the same search opened, with sink and window, without summaries."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    queries, keys, values = states(setting, tokens)
    pyramid = built(setting, keys, values)
    blocks, cut = blocks_of(tokens, setting.block), in_blocks(queries, setting.block)
    policy = replace(setting.policy, rest="drop")
    cover = chosen(cut, blocks, pyramid, policy)
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
    row = row_of(
        "prefill", "read, same blocks, rest dropped", "FlexAttention", tokens, 1, time, "selection not included"
    )
    return rated(row, machine, 4 * setting.dim * setting.query_heads * entries, 0, entries / tokens)


def same_blocks_row(setting: Setting, machine: Machine, tokens: int) -> Row:
    """The read kernel over exactly what FlexAttention is given."""
    queries, keys, values = states(setting, tokens)
    pyramid = built(setting, keys, values)
    blocks, cut = blocks_of(tokens, setting.block), in_blocks(queries, setting.block)
    cover = chosen(cut, blocks, pyramid, replace(setting.policy, rest="drop"))
    plain = replace(setting, positions="absolute")
    part = "read, same blocks, rest dropped"
    return read_row(plain, machine, tokens, cut, pyramid, [(slice(0, len(blocks)), blocks, cover)], part)


def nsa_row(setting: Setting, machine: Machine, tokens: int) -> Row:
    """Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089) by the kernels of flash-linear-attention.

    Its means of blocks, its choice of as many blocks as our budget holds, no window (which would need flash-attn).

    Raises:
        SettingError: for groups that it does not serve.
    """
    if setting.query_heads // setting.kv_heads < 16:
        raise SettingError("its kernels need 16 query heads to a KV head; run with --heads 64,4")
    from fla.ops.nsa import parallel_nsa

    queries, keys, values = (part.transpose(1, 2).contiguous() for part in states(setting, tokens))
    gate = torch.ones(1, tokens, setting.query_heads, device="cuda", dtype=setting.dtype)
    chunk, count = setting.sizes[1], setting.budget // setting.sizes[1]

    def call() -> Tensor:
        with torch.no_grad():
            return parallel_nsa(queries, keys, values, gate, gate, None, None, count, chunk, 0)

    row = row_of("prefill", "search + read", "NSA of flash-linear-attention, no window", tokens, 1, timed(call))
    entries = setting.budget + tokens / 2 / chunk
    return rated(row, machine, 4 * setting.dim * setting.query_heads * tokens * entries, 0, entries)


def moba_row(setting: Setting, machine: Machine, tokens: int) -> Row:
    """Mixture of Block Attention (Lu et al. 2025, arXiv 2502.13189) by flash-linear-attention, over PyTorch's build of
    the flash kernels that it is written for.

    Blocks of 512 tokens, as many as our budget and window hold. It knows no groups: keys and values are repeated.
    """
    from fla.ops.moba import parallel as moba

    moba.flash_attn_varlen_func = moba._flash_attn_varlen_forward = _flash_packed
    queries, keys, values = (part.transpose(1, 2) for part in states(setting, tokens))
    group = setting.query_heads // setting.kv_heads
    keys, values = (part.repeat_interleave(group, 2) for part in (keys, values))
    borders = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    chunk = 512
    count = (setting.budget + setting.window) // chunk

    def call() -> Tensor:
        with torch.no_grad():
            found: Tensor = moba.parallel_moba(queries.contiguous(), keys, values, borders, tokens, chunk, count)
        return found

    time = timed(call)
    row = row_of("prefill", "search + read", "MoBA of flash-linear-attention, PyTorch's flash kernels", tokens, 1, time)
    entries = setting.budget + chunk / 2
    return rated(row, machine, 4 * setting.dim * setting.query_heads * tokens * entries, 0, entries)


def _flash_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, None, None]:
    """Results (T, H, D) and log-sum-exp (H, T) of packed texts, as flash-attn gives them."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), max_seqlen_q, max_seqlen_k, dropout_p, causal, False,
        scale=softmax_scale,
    )  # fmt: skip
    return out, lse, None, None


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
    return row_of("decode", "search + read", f"Quest-like, pages of {page}, read by mgam triton", tokens, batch, time)

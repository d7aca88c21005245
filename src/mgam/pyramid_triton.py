"""Building a pyramid on the device: summaries of level 1 and search keys in one pass over new keys and values, which
are copied into the pyramid on the way.

Higher levels are means of this one, a small share of the work, and stay in plain torch. Gradients of all levels come
back to the tokens in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgam.kernels import cdiv, power_of_2
from mgam.levels import Levels


@triton.jit(do_not_specialize=["heads", "chunks"])
def build_kernel(
    key_ptr, value_ptr, key_mean_ptr, value_mean_ptr, search_ptr, heads, chunks,
    key_strides, value_strides, key_mean_strides, value_mean_strides, search_strides, kept_key_ptr, kept_value_ptr,
    kept_key_strides, kept_value_strides,
    KEEP: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of S * P tokens of one row and KV head; with KEEP its tokens are copied too."""
    chunk = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    place = tl.arange(0, BLOCK_S)[:, None, None]
    inside = tl.arange(0, BLOCK_P)[None, :, None]
    column = tl.arange(0, BLOCK_D)
    token = chunk * S * P + place * P + inside
    mask = (place < S) & (inside < P) & (column < D)[None, None, :]
    key = tl.load(
        key_ptr + row * key_strides[0] + head * key_strides[1] + token * key_strides[2] + column[None, None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    value = tl.load(
        value_ptr + row * value_strides[0] + head * value_strides[1] + token * value_strides[2] + column[None, None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    if KEEP:
        target = row * kept_key_strides[0] + head * kept_key_strides[1] + token * kept_key_strides[2]
        tl.store(kept_key_ptr + target + column[None, None, :], key, mask=mask)
        target = row * kept_value_strides[0] + head * kept_value_strides[1] + token * kept_value_strides[2]
        tl.store(kept_value_ptr + target + column[None, None, :], value, mask=mask)
    fine = tl.sum(key.to(tl.float32), 1)
    coarse = tl.sum(fine, 0) / (S * P)
    mean = tl.sum(tl.sum(value.to(tl.float32), 1), 0) / (S * P)
    there = column < D
    target = row * key_mean_strides[0] + head * key_mean_strides[1] + chunk * key_mean_strides[2]
    tl.store(
        key_mean_ptr + target + column,
        coarse.to(key_mean_ptr.dtype.element_ty), mask=there,
    )  # fmt: skip
    target = row * value_mean_strides[0] + head * value_mean_strides[1] + chunk * value_mean_strides[2]
    tl.store(
        value_mean_ptr + target + column,
        mean.to(value_mean_ptr.dtype.element_ty), mask=there,
    )  # fmt: skip
    spot = tl.arange(0, BLOCK_S)[:, None]
    target = row * search_strides[0] + head * search_strides[1] + chunk * search_strides[3]
    tl.store(
        search_ptr + target + spot * search_strides[2] + column[None, :],
        (fine / P).to(search_ptr.dtype.element_ty), mask=(spot < S) & there[None, :],
    )  # fmt: skip


def build(
    keys: Tensor,
    values: Tensor,
    key_means: Tensor,
    value_means: Tensor,
    search: Tensor,
    levels: Levels,
    kept: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fills the summaries of level 1 and the search keys of complete chunks; copies the tokens to `kept`, if given.

    Shapes, by any strides but the last: keys, values and those in `kept` (B, H, C*chunk, D); key_means, value_means
    (B, H, C, D); search (B, H, S, C, D).
    """
    batch, heads, chunks, dim = key_means.shape
    if not key_means.numel():
        return
    places, inside = levels.search_per_chunk, levels.search
    into = kept or (keys, values)
    build_kernel[(chunks, batch * heads)](
        keys, values, key_means, value_means, search, heads, chunks,
        keys.stride()[:3], values.stride()[:3], key_means.stride()[:3], value_means.stride()[:3], search.stride()[:4],
        *into, into[0].stride()[:3], into[1].stride()[:3], KEEP=kept is not None,
        S=places, P=inside, D=dim, BLOCK_S=power_of_2(places), BLOCK_P=power_of_2(inside),
        BLOCK_D=power_of_2(dim), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "tokens"])
def spread_kernel(
    dk_ptr, dv_ptr, key_grads, value_grads, key_strides, value_strides, counts, heads, tokens,
    SIZES: tl.constexpr, LEVELS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: gradients of BLOCK tokens of one row and KV head, their own and their share of their summaries'.

    dk, dv (B, H, tokens, D) contiguous; key_grads[l], value_grads[l] (B, H, counts[l], D) by strides, level 0 being the
    tokens; nothing comes back to a level whose count is 0.
    """
    pair = tl.program_id(1).to(tl.int64)
    row = pair // heads
    head = pair % heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    there = (column < D)[None, :]
    key = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    value = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for level in tl.static_range(LEVELS):
        index = token // SIZES[level]
        mask = (index < counts[level])[:, None] & there
        line = row * key_strides[level][0] + head * key_strides[level][1] + index.to(tl.int64) * key_strides[level][2]
        found = tl.load(key_grads[level] + line[:, None] + column[None, :], mask=mask, other=0.0)
        key += found.to(tl.float32) / SIZES[level]
        strides = value_strides[level]
        line = row * strides[0] + head * strides[1] + index.to(tl.int64) * strides[2]
        found = tl.load(value_grads[level] + line[:, None] + column[None, :], mask=mask, other=0.0)
        value += found.to(tl.float32) / SIZES[level]
    target = (pair * tokens + token)[:, None] * D + column[None, :]
    mask = (token < tokens)[:, None] & there
    tl.store(dk_ptr + target, key.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + target, value.to(dv_ptr.dtype.element_ty), mask=mask)


def summarised(
    keys: Tensor, values: Tensor, levels: Levels, kept: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys and values of all levels of whole sequences (B, H, T, D), differentiable with respect to both, and search
    keys of type `kept`."""
    learns = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
    given = keys, values, levels, kept
    search, *states = Summarised.apply(*given) if learns else _summarised(*given)
    half = len(states) // 2
    return states[:half], states[half:], search


class Summarised(torch.autograd.Function):
    """The levels of a pyramid, tokens among them, as one differentiable operation."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, levels: Levels, kept: torch.dtype) -> tuple[Tensor, ...]:
        search, *states = _summarised(keys, values, levels, kept)
        ctx.levels, ctx.like = levels, (keys.shape, keys.dtype, keys.device)
        ctx.mark_non_differentiable(search)
        ctx.set_materialize_grads(False)
        return search, *states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.like
        half = len(grads) // 2
        dk, dv = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        _spread(dk, dv, grads[1 : 1 + half], grads[1 + half :], ctx.levels)
        return dk, dv, None, None


def _summarised(keys: Tensor, values: Tensor, levels: Levels, kept: torch.dtype) -> tuple[Tensor, ...]:
    """Search keys, keys of all levels, values of all levels."""
    batch, heads, tokens, dim = keys.shape
    chunks = tokens // levels.chunk
    search = keys.new_empty(batch, heads, levels.search_per_chunk, chunks, dim, dtype=kept)
    found = []
    for states in (keys, values):
        counts = [chunks]
        for level in range(2, levels.top + 1):
            counts.append(counts[-1] // levels.ratio(level))
        found.append([states, *(states.new_empty(batch, heads, count, dim) for count in counts)])
    whole = chunks * levels.chunk
    build(keys[:, :, :whole], values[:, :, :whole], found[0][1], found[1][1], search, levels)
    for level in range(2, levels.top + 1):
        for made in found:
            count, ratio = made[level].shape[2], levels.ratio(level)
            if count:
                torch.mean(made[level - 1][:, :, : count * ratio].unflatten(2, (count, ratio)), 3, out=made[level])
    return search, *found[0], *found[1]


def _spread(
    dk: Tensor, dv: Tensor, key_grads: Sequence[Tensor | None], value_grads: Sequence[Tensor | None], levels: Levels
) -> None:
    """Fills gradients of keys and values (B, H, T, D) from those of all levels."""
    batch, heads, tokens, dim = dk.shape
    if not dk.numel():
        return
    grads = [_there(pair, dk) for pair in zip(key_grads, value_grads, strict=True)]
    counts = tuple(pair[0].shape[2] for pair in grads)
    for_keys, for_values = (tuple(pair[number] for pair in grads) for number in range(2))
    steps = (tuple(grad.stride()[:3] for grad in some) for some in (for_keys, for_values))
    spread_kernel[(cdiv(tokens, 32), batch * heads)](
        dk, dv, for_keys, for_values, *steps, counts, heads, tokens,
        SIZES=levels.sizes, LEVELS=len(levels.sizes), D=dim, BLOCK_D=power_of_2(dim), BLOCK=32, num_warps=4,
    )  # fmt: skip


def _there(pair: tuple[Tensor | None, Tensor | None], like: Tensor) -> list[Tensor]:
    """Gradients of one level's keys and values, by any strides but the last: zeros for the one that is not there, and
    no entries where both are not."""
    some = next((grad for grad in pair if grad is not None), like[:, :, :0])
    found = [torch.zeros_like(some) if grad is None else grad for grad in pair]
    return [grad if grad.stride(3) == 1 else grad.contiguous() for grad in found]

"""Building a pyramid on the device: summaries of level 1 and search keys in one pass over new keys and values, which
are copied into the pyramid on the way.

Higher levels are means of this one, a small share of the work, and stay in plain torch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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
        S=places, P=inside, D=dim, BLOCK_S=triton.next_power_of_2(places), BLOCK_P=triton.next_power_of_2(inside),
        BLOCK_D=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip

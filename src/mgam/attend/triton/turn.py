"""Keys rotated once, into buffers that the read kernel takes, rather than by every tile of rows.

`turn_kernel`: keys of a cover by their ranks, for all the rows of a block. `place_keys_kernel`: keys of a text by their
true positions: only distances matter to a rotation, so that windows of all blocks read the same ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.attend.triton.tiles import OPENED, SUMMARIES, entries, placed, states


@triton.jit(
    do_not_specialize=["limit", "anchor", "heads", "tiles"], do_not_specialize_on_alignment=["row_ptr", "count_ptr"]
)
def turn_kernel(
    ready_ptr, row_ptr, count_ptr, keys, key_strides, lists, ranks, widths, offsets, cos_ptr, sin_ptr, limit,
    anchor, heads, tiles, room,
    CHUNK: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N entries of one block and KV head. ready_ptr (N, H, room, D); the list of level l begins
    at offsets[l]; levels below LOWEST are left out.

    Only halves that rotate whole are served: D == 2 R, a power of two.
    """
    first = tl.program_id(0) % tiles * BLOCK_N
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    head = pair % heads
    row = tl.load(row_ptr + pair // heads)
    for level in tl.static_range(TOP + 1):
        if level >= LOWEST and widths[level] > 0:
            count = tl.load(count_ptr + pair * (TOP + 1) + level)
            if level == 0:
                count = count * CHUNK
            j = first - offsets[level]
            if (j >= 0) & (j < count):
                index, rank, live = entries(
                    j, count, lists[level] + pair * widths[level], ranks[level] + pair * widths[level], 0, anchor,
                    OPENED if level == 0 else SUMMARIES, CHUNK, BLOCK_N, R,
                )  # fmt: skip
                rank = tl.minimum(tl.maximum(rank, 0), limit)
                k0, k1, _ = states(
                    keys[level] + row * key_strides[level][0] + head * key_strides[level][1],
                    index * key_strides[level][2],
                    live, rank, cos_ptr, sin_ptr, D, R, 2 * R, R, 16, True,
                )  # fmt: skip
                column = tl.arange(0, R)
                target = (pair * room + first + tl.arange(0, BLOCK_N))[:, None] * D + column[None, :]
                tl.store(ready_ptr + target, k0)
                tl.store(ready_ptr + target + R, k1)


@triton.jit(do_not_specialize=["heads", "tokens", "room"])
def place_keys_kernel(
    placed_ptr, key_ptr, key_strides, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, heads, tokens, room,
    R: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N tokens of one row and KV head. placed_ptr (B, H, room, 2 R), zeros beyond `tokens`."""
    pair = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = key_ptr + pair // heads * key_strides[0] + pair % heads * key_strides[1]
    live = place < tokens
    k0, k1 = placed(
        base, place.to(tl.int64) * key_strides[2], live, tl.minimum(place, tokens - 1), cos_ptr, sin_ptr, far_cos_ptr,
        far_sin_ptr, R, STEP,
    )  # fmt: skip
    target = (pair * room + place)[:, None] * (2 * R) + tl.arange(0, R)[None, :]
    mask = (place < room)[:, None]
    tl.store(placed_ptr + target, k0, mask=mask)
    tl.store(placed_ptr + target + R, k1, mask=mask)

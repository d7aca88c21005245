"""What shortens search keys, from a row's first keys, in one launch: mean, basis, step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEPS = 4
"""Orthogonal iterations, of two powers each."""
COLUMNS = 64
"""Columns of a product at a time: more would take more shared memory than small GPUs have."""


@triton.jit
def calibrate_kernel(
    key_ptr, basis_ptr, mean_ptr, offset_ptr, step_ptr, half_ptr, moment_ptr, square_ptr, heads, count,
    step_row, step_head, step_place, step_chunk, STEPS: tl.constexpr, PLACES: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """One program: mean (D), basis (D, WIDTH), rounded in half_ptr, the mean in the basis (WIDTH) and the step of one
    row and KV head.

    Orthogonal iteration in float32 on the second moments of `count` chunks of PLACES keys each, less their mean;
    moment_ptr and square_ptr (B, H, D, D) float32 are working memory. D and WIDTH are powers of two. PEAK: which number
    the largest coordinate becomes; 0: steps are 1.
    """
    pair = tl.program_id(0).to(tl.int64)
    key_ptr += pair // heads * step_row + pair % heads * step_head
    basis_ptr += pair * D * WIDTH
    half_ptr += pair * D * WIDTH
    mean_ptr += pair * D
    moment_ptr += pair * D * D
    square_ptr += pair * D * D
    line = tl.arange(0, D)
    short = tl.arange(0, WIDTH)
    part = tl.arange(0, PART)
    number = tl.arange(0, BLOCK)
    total = count * PLACES
    size = _moments(
        key_ptr, mean_ptr, moment_ptr, total, count, step_place, step_chunk, line, tl.arange(0, COLUMNS), number, D,
        COLUMNS, BLOCK,
    )  # fmt: skip
    for first in tl.range(0, D, PART):  # in units of their mean, with a little of every direction
        place = moment_ptr + (first + part)[:, None] * D + line[None, :]
        tl.store(place, tl.load(place) / size + tl.where((first + part)[:, None] == line[None, :], 1e-7, 0.0))
    tl.debug_barrier()
    _product(square_ptr, moment_ptr, moment_ptr, D, D, COLUMNS, PART)
    basis = _orthonormal(tl.load(square_ptr + line[:, None] * D + short[None, :]), short, WIDTH)
    here = basis_ptr + line[:, None] * WIDTH + short[None, :]
    for _ in tl.range(1, STEPS):
        tl.store(here, basis)
        tl.debug_barrier()
        _product(moment_ptr, square_ptr, basis_ptr, D, WIDTH, COLUMNS, PART)
        basis = _orthonormal(tl.load(moment_ptr + line[:, None] * WIDTH + short[None, :]), short, WIDTH)
    basis = _orthonormal(basis, short, WIDTH)  # what was nearly parallel comes out square
    tl.store(here, basis)
    tl.store(half_ptr + line[:, None] * WIDTH + short[None, :], basis.to(half_ptr.dtype.element_ty))
    tl.store(offset_ptr + pair * WIDTH + short, tl.sum(basis * tl.load(mean_ptr + line)[:, None], 0))
    tl.debug_barrier()
    step = 1.0
    if PEAK > 0:
        peak = tl.zeros((WIDTH,), tl.float32)
        for first in tl.range(0, total, BLOCK):
            place = first + number
            at = key_ptr + (place // count * step_place + place % count * step_chunk)[:, None]
            turned = tl.zeros((BLOCK, WIDTH), tl.float32)
            for begin in tl.range(0, D, PART):
                mean = tl.load(mean_ptr + begin + part)[None, :]
                keys = tl.load(at + (begin + part)[None, :], mask=(place < total)[:, None], other=0.0).to(tl.float32)
                keys = tl.where((place < total)[:, None], keys - mean, 0.0)
                right = tl.load(basis_ptr + (begin + part)[:, None] * WIDTH + short[None, :])
                turned += tl.dot(keys, right, input_precision="tf32")
            peak = tl.maximum(peak, tl.max(tl.abs(turned), 0))
        step = tl.maximum(tl.max(peak, 0), 1e-20) / PEAK
    tl.store(step_ptr + pair, step)


@triton.jit
def _moments(
    key_ptr, mean_ptr, moment_ptr, total, count, step_place, step_chunk, line, column, number, D: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes mean (D) and second moments (D, D) of `total` keys less their mean; returns the mean of the variances.

    All is taken less the first key, which lies near the mean: so sums of squares lose nothing.
    """
    near = tl.load(key_ptr + line).to(tl.float32)
    size = 0.0
    for slab in tl.range(0, D, COLUMNS):
        near_own = tl.load(key_ptr + slab + column).to(tl.float32)
        sums = tl.zeros((D,), tl.float32)
        own_sums = tl.zeros((COLUMNS,), tl.float32)
        squares = tl.zeros((COLUMNS,), tl.float32)
        moments = tl.zeros((D, COLUMNS), tl.float32)
        for first in tl.range(0, total, BLOCK):
            place = first + number
            at = key_ptr + (place // count * step_place + place % count * step_chunk)[:, None]
            here = (place < total)[:, None]
            keys = tl.where(here, tl.load(at + line[None, :], mask=here, other=0.0).to(tl.float32) - near, 0.0)
            own = tl.load(at + slab + column[None, :], mask=here, other=0.0).to(tl.float32)
            own = tl.where(here, own - near_own, 0.0)
            sums += tl.sum(keys, 0)
            own_sums += tl.sum(own, 0)
            squares += tl.sum(own * own, 0)
            moments += tl.dot(tl.trans(keys), own, input_precision="tf32")
        moments -= sums[:, None] * (own_sums / total)[None, :]
        tl.store(moment_ptr + line[:, None] * D + slab + column[None, :], moments)
        tl.store(mean_ptr + slab + column, near_own + own_sums / total)
        size += tl.sum(squares - own_sums * own_sums / total, 0) / D
    tl.debug_barrier()
    return tl.maximum(size, 1e-36)


@triton.jit
def _product(
    out_ptr, left_ptr, right_ptr, D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Writes out (D, WIDTH) = left (D, D) @ right (D, WIDTH), in float32."""
    line = tl.arange(0, D)
    part = tl.arange(0, PART)
    STEP: tl.constexpr = COLUMNS if COLUMNS < WIDTH else WIDTH
    column = tl.arange(0, STEP)
    for slab in tl.range(0, WIDTH, STEP):
        found = tl.zeros((D, STEP), tl.float32)
        for first in tl.range(0, D, PART):
            left = tl.load(left_ptr + line[:, None] * D + (first + part)[None, :])
            right = tl.load(right_ptr + (first + part)[:, None] * WIDTH + slab + column[None, :])
            found += tl.dot(left, right, input_precision="tf32x3")
        tl.store(out_ptr + line[:, None] * WIDTH + slab + column[None, :], found)
    tl.debug_barrier()


@triton.jit
def _orthonormal(basis, column, WIDTH: tl.constexpr):
    """Columns by Gram and Schmidt's method: each is taken off all those after it."""
    for number in tl.range(0, WIDTH):
        own = tl.sum(tl.where((column == number)[None, :], basis, 0.0), 1)
        own = own * tl.rsqrt(tl.maximum(tl.sum(own * own, 0), 1e-36))
        share = tl.sum(basis * own[:, None], 0)
        rest = basis - own[:, None] * share[None, :]
        basis = tl.where((column == number)[None, :], own[:, None], tl.where((column > number)[None, :], rest, basis))
    return basis


def serves(dim: int, width: int) -> bool:
    """Whether the kernel takes bases of these shapes."""
    return 16 <= width < dim and not (dim & (dim - 1) or width & (width - 1))


def calibrate(
    keys: Tensor, basis: Tensor, mean: Tensor, offset: Tensor, step: Tensor, half: Tensor, peak: float
) -> None:
    """Writes the basis (B, H, D, d) of the leading directions of search keys (B, H, S, C, D) less their mean, the mean
    (B, H, D), the mean in the basis (B, H, d), the step (B, H) that makes the largest coordinate `peak`, or 1 where
    `peak` is 0, and the basis in the precision of `half`. All others are float32, and all contiguous; at least one
    chunk; `serves` says which dimensions there may be."""
    rows, heads, places, count, dim = keys.shape
    width = basis.shape[-1]
    if keys.stride(-1) != 1:
        keys = keys.contiguous()
    work = torch.empty(2, rows, heads, dim, dim, dtype=torch.float32, device=keys.device)
    calibrate_kernel[(rows * heads,)](
        keys, basis, mean, offset, step, half, work[0], work[1], heads, count, *keys.stride()[:4], STEPS=STEPS,
        PLACES=places, D=dim, WIDTH=width, COLUMNS=min(dim, COLUMNS), BLOCK=64, PART=32, PEAK=peak,
        num_warps=min(16, max(4, dim * width // 1024)),
    )  # fmt: skip

"""What shortens search keys, from a row's first keys, in one launch: mean, basis, step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEPS = 4
"""Orthogonal iterations, of two powers each."""
SLAB = 128
"""Columns of a product at a time: more would not stay in registers."""


@triton.jit
def calibrate_kernel(
    key_ptr, basis_ptr, mean_ptr, offset_ptr, step_ptr, moment_ptr, square_ptr, heads, count,
    step_row, step_head, step_place, step_chunk, STEPS: tl.constexpr, PLACES: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """One program: mean (D), basis (D, WIDTH), the mean in the basis (WIDTH) and the step of one row and KV head.

    Orthogonal iteration in float32 on the second moments of `count` chunks of PLACES keys each, less their mean;
    moment_ptr and square_ptr (B, H, D, D) float32 are working memory. D and WIDTH are powers of two. PEAK: which number
    the largest coordinate becomes; 0: steps are 1.
    """
    pair = tl.program_id(0).to(tl.int64)
    key_ptr += pair // heads * step_row + pair % heads * step_head
    basis_ptr += pair * D * WIDTH
    moment_ptr += pair * D * D
    square_ptr += pair * D * D
    line = tl.arange(0, D)
    short = tl.arange(0, WIDTH)
    column = tl.arange(0, COLUMNS)
    number = tl.arange(0, BLOCK)
    part = tl.arange(0, PART)
    total = count * PLACES
    shift = tl.load(key_ptr + line).to(tl.float32)  # near the mean, so that sums of squares lose nothing
    size = 0.0
    for slab in tl.static_range(0, D, COLUMNS):
        near = tl.load(key_ptr + slab + column).to(tl.float32)
        some = tl.zeros((D,), tl.float32)
        own = tl.zeros((COLUMNS,), tl.float32)
        squares = tl.zeros((COLUMNS,), tl.float32)
        moments = tl.zeros((D, COLUMNS), tl.float32)
        for first in tl.range(0, total, BLOCK):
            place = first + number
            at = key_ptr + (place // count * step_place + place % count * step_chunk)[:, None]
            here = (place < total)[:, None]
            all_ = tl.where(here, tl.load(at + line[None, :], mask=here, other=0.0).to(tl.float32) - shift, 0.0)
            few = tl.where(here, tl.load(at + slab + column[None, :], mask=here, other=0.0).to(tl.float32) - near, 0.0)
            some += tl.sum(all_, 0)
            own += tl.sum(few, 0)
            squares += tl.sum(few * few, 0)
            moments += tl.dot(tl.trans(all_), few, input_precision="tf32")
        moments -= some[:, None] * (own / total)[None, :]
        tl.store(moment_ptr + line[:, None] * D + slab + column[None, :], moments)
        tl.store(mean_ptr + pair * D + slab + column, near + own / total)
        size += tl.sum(squares - own * own / total, 0) / D
    size = tl.maximum(size, 1e-36)
    tl.debug_barrier()
    for slab in tl.static_range(0, D, COLUMNS):
        square = tl.zeros((D, COLUMNS), tl.float32)
        for first in tl.range(0, D, PART):
            left = _moments(moment_ptr, line, first + part, size, D)
            right = _moments(moment_ptr, first + part, slab + column, size, D)
            square += tl.dot(left, right, input_precision="tf32x3")
        tl.store(square_ptr + line[:, None] * D + slab + column[None, :], square)
    tl.debug_barrier()
    basis = tl.load(square_ptr + line[:, None] * D + short[None, :])
    basis = _orthonormal(basis, short, WIDTH)
    for _ in tl.range(1, STEPS):
        tl.store(basis_ptr + line[:, None] * WIDTH + short[None, :], basis)
        tl.debug_barrier()
        basis = tl.zeros((D, WIDTH), tl.float32)
        for first in tl.range(0, D, PART):
            left = tl.load(square_ptr + line[:, None] * D + (first + part)[None, :])
            right = tl.load(basis_ptr + (first + part)[:, None] * WIDTH + short[None, :])
            basis += tl.dot(left, right, input_precision="tf32x3")
        tl.debug_barrier()
        basis = _orthonormal(basis, short, WIDTH)
    basis = _orthonormal(basis, short, WIDTH)  # what was nearly parallel comes out square
    tl.store(basis_ptr + line[:, None] * WIDTH + short[None, :], basis)
    mean = tl.load(mean_ptr + pair * D + line)
    tl.store(offset_ptr + pair * WIDTH + short, tl.sum(basis * mean[:, None], 0))
    step = 1.0
    if PEAK > 0:
        peak = tl.zeros((WIDTH,), tl.float32)
        tl.debug_barrier()
        for first in tl.range(0, total, BLOCK):
            place = first + number
            at = key_ptr + (place // count * step_place + place % count * step_chunk)[:, None]
            here = (place < total)[:, None]
            turned = tl.zeros((BLOCK, WIDTH), tl.float32)
            for begin in tl.range(0, D, PART):
                some = tl.load(mean_ptr + pair * D + begin + part)
                keys = tl.load(at + (begin + part)[None, :], mask=here, other=0.0).to(tl.float32)
                keys = tl.where(here, keys - some[None, :], 0.0)
                right = tl.load(basis_ptr + (begin + part)[:, None] * WIDTH + short[None, :])
                turned += tl.dot(keys, right, input_precision="tf32")
            peak = tl.maximum(peak, tl.max(tl.abs(turned), 0))
        step = tl.maximum(tl.max(peak, 0), 1e-20) / PEAK
    tl.store(step_ptr + pair, step)


@triton.jit
def _moments(moment_ptr, left, right, size, D: tl.constexpr):
    """Some of the moments, in units of their mean; with a little of every direction."""
    some = tl.load(moment_ptr + left[:, None] * D + right[None, :]) / size
    return some + tl.where(left[:, None] == right[None, :], 1e-7, 0.0)


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


def calibrate(keys: Tensor, basis: Tensor, mean: Tensor, offset: Tensor, step: Tensor, peak: float) -> None:
    """Writes the basis (B, H, D, d) of the leading directions of search keys (B, H, S, C, D) less their mean, the mean
    (B, H, D), the mean in the basis (B, H, d), and the step (B, H) that makes the largest coordinate `peak`, or 1 where
    `peak` is 0. All are float32 and contiguous; at least one chunk; `serves` says which dimensions there may be."""
    rows, heads, places, count, dim = keys.shape
    width = basis.shape[-1]
    if keys.stride(-1) != 1:
        keys = keys.contiguous()
    work = torch.empty(2, rows, heads, dim, dim, dtype=torch.float32, device=keys.device)
    calibrate_kernel[(rows * heads,)](
        keys, basis, mean, offset, step, work[0], work[1], heads, count, *keys.stride()[:4], STEPS=STEPS,
        PLACES=places, D=dim, WIDTH=width, COLUMNS=min(dim, SLAB), BLOCK=64, PART=32, PEAK=peak,
        num_warps=min(16, max(4, dim * width // 1024)),
    )  # fmt: skip

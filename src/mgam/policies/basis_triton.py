"""Orthonormal columns in one launch, for bases of search keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def orthonormal_kernel(basis_ptr, D: tl.constexpr, WIDTH: tl.constexpr):
    """One program: one basis (D, WIDTH), float32, in place, by Gram and Schmidt's method: each column is taken off
    all those after it. Powers of two."""
    pair = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, D)
    column = tl.arange(0, WIDTH)
    place = basis_ptr + pair * D * WIDTH + line[:, None] * WIDTH + column[None, :]
    basis = tl.load(place)
    for number in tl.range(0, WIDTH):
        own = tl.sum(tl.where((column == number)[None, :], basis, 0.0), 1)
        own = own * tl.rsqrt(tl.maximum(tl.sum(own * own, 0), 1e-36))
        share = tl.sum(basis * own[:, None], 0)
        rest = basis - own[:, None] * share[None, :]
        basis = tl.where((column == number)[None, :], own[:, None], tl.where((column > number)[None, :], rest, basis))
    tl.store(place, basis)


def principal(moments: Tensor, width: int, steps: int = 4) -> Tensor:
    """As `mgam.policies.compact.principal`, in float32 and with two powers a step: moments (..., D, D), D and width
    powers of two, at least 16."""
    dim = moments.shape[-1]
    wide = moments.float()
    size = wide.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-36)
    eye = torch.eye(dim, device=moments.device)
    wide = wide / size + 1e-7 * eye
    twice = wide @ wide
    basis = eye[:, :width].expand(*moments.shape[:-2], dim, width)
    warps = min(16, max(4, dim * width // 2048))  # 64 numbers a thread: more would not stay in registers
    for number in range(steps + 1):  # a last time without a product: what was nearly parallel comes out square
        basis = (twice @ basis if number < steps else basis).contiguous()
        orthonormal_kernel[(basis[..., 0, 0].numel(),)](basis, D=dim, WIDTH=width, num_warps=warps)
    return basis.to(moments.dtype)

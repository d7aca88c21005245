"""Rotation of queries and keys in one pass, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgam.kernels import cdiv

BLOCK = 64


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    states_ptr, row_step, head_step, token_step, cos_ptr, sin_ptr, out_ptr, heads, tokens,
    D: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens of one row and head. states (B, n, T, D) by strides, cos and sin (T, R) float32; out
    (B, T, n, D). BACK turns the other way."""
    pair = tl.program_id(1)
    row = (pair // heads).to(tl.int64)
    head = pair % heads
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    there = token < tokens
    half = tl.arange(0, R)[None, :]
    given = states_ptr + row * row_step + head * head_step + token * token_step
    target = out_ptr + ((row * tokens + token) * heads + head) * D
    cos = tl.load(cos_ptr + token * R + half, mask=there, other=0.0)
    sin = tl.load(sin_ptr + token * R + half, mask=there, other=0.0)
    if BACK:
        sin = -sin
    first = tl.load(given + half, mask=there, other=0.0).to(tl.float32)
    second = tl.load(given + R + half, mask=there, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    tl.store(target + half, (first * cos - second * sin).to(kind), mask=there)
    tl.store(target + R + half, (second * cos + first * sin).to(kind), mask=there)
    if 2 * R < D:
        rest = tl.arange(0, D - 2 * R)[None, :]
        tl.store(target + 2 * R + rest, tl.load(given + 2 * R + rest, mask=there, other=0.0), mask=there)


def serves(states: Tensor, half: int) -> bool:
    """Whether heads (B, n, T, D) and so many rotated pairs have sizes that the kernel takes."""
    dim = states.shape[-1]
    rest = dim - 2 * half
    return all(size & (size - 1) == 0 for size in (half, dim, rest)) and 0 < half <= dim // 2 and states.stride(-1) == 1


class Rotation(torch.autograd.Function):
    """States (B, n, T, D), the first 2*R dimensions rotated by half-tables (T, R) float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, True), None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    rows, heads, tokens, dim = states.shape
    out = torch.empty(rows, tokens, heads, dim, dtype=states.dtype, device=states.device)
    rotate_kernel[(cdiv(tokens, BLOCK), rows * heads)](
        states, *states.stride()[:3], cos, sin, out, heads, tokens,
        D=dim, R=cos.shape[1], BACK=back, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2)

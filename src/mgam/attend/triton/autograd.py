"""Attention over a cover as one differentiable operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgam.attend.triton.forward import read
from mgam.attend.triton.gradient import gradients
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import Turn
from mgam.merge import Part


class Read(torch.autograd.Function):
    """Forward and backward of reading a cover. The selection is kept, not made again."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, lists: Lists, turn: Turn, scale: float, softcap: float | None, *states: Tensor
    ) -> Tensor:
        half = len(states) // 2
        part = read(queries, lists, states[:half], states[half:], scale, turn=turn, softcap=softcap)
        ctx.save_for_backward(queries, part.out, part.lse, *states)
        ctx.lists, ctx.turn, ctx.scale, ctx.softcap = lists, turn, scale, softcap
        return part.out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, out, lse, *states = ctx.saved_tensors
        half = len(states) // 2
        dq, dks, dvs = gradients(
            grads[0],
            Part(out, lse),
            queries,
            ctx.lists,
            states[:half],
            states[half:],
            ctx.scale,
            turn=ctx.turn,
            softcap=ctx.softcap,
        )
        return dq, None, None, None, None, *dks, *dvs

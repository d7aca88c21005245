"""The backend as the dispatcher sees it: what it refuses, and one call from query blocks to their attention."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgam import kernels
from mgam.cover import Cover
from mgam.errors import SettingError
from mgam.positions import Positions
from mgam.pyramid import Elsewhere, Pyramid
from mgam.schedule import Blocks

if TYPE_CHECKING:
    from mgam.attend.triton.lists import Lists
    from mgam.attend.triton.tables import Turn

HEAD_DIMS = (64, 96, 128, 256)


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuse(queries: Tensor) -> list[str]:
    """Every reason why these queries cannot be served."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if queries.device.type != "cuda" and not interpreted():
        reasons.append("it needs a CUDA device (or TRITON_INTERPRET=1, for tests)")
    if queries.is_cuda and kernels.capability(queries.device) < kernels.OLDEST:
        reasons.append("it needs a GPU of compute capability 8.0 or newer")
    if queries.dtype not in (torch.float16, torch.bfloat16) and not (interpreted() and queries.dtype == torch.float32):
        reasons.append("it serves float16 and bfloat16 only")
    if queries.dtype == torch.bfloat16 and interpreted():
        reasons.append("Triton's interpreter cannot multiply bfloat16")
    if queries.shape[-1] not in HEAD_DIMS and not interpreted():
        reasons.append(f"it serves head dimensions {', '.join(map(str, HEAD_DIMS))}")
    return reasons


def attend(
    queries: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One softmax over each block's cover. Shapes: queries (N, H*G, Q, D); returns the same shape. Differentiable,
    unless it is written to `out`.

    Raises:
        SettingError: when shapes, dtypes, devices or indices do not fit one another, before anything is launched.
    """
    if not len(blocks) or not blocks.size:
        return torch.zeros_like(queries)
    lists, keys, values, turn = _called(queries, blocks, cover, pyramid, positions, scale)
    if not torch.is_grad_enabled() or not any(states.requires_grad for states in (queries, *keys, *values)):
        from mgam.attend.triton.forward import read

        return read(queries, lists, keys, values, scale, turn=turn, softcap=softcap, out=out).out
    from mgam.attend.triton.autograd import Read

    return Read.apply(queries, lists, turn, scale, softcap, *keys, *values)


def watched(
    queries: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attend`, without gradients, and the attention mass (N, H, K) of each opened chunk."""
    from mgam.attend.triton.forward import read
    from mgam.attend.triton.masses import masses

    lists, keys, values, turn = _called(queries, blocks, cover, pyramid, positions, scale)
    part = read(queries, lists, keys, values, scale, turn=turn, softcap=softcap)
    return part.out, masses(queries, lists, keys[0], part.lse, scale, turn=turn, softcap=softcap)


def _called(
    queries: Tensor, blocks: Blocks, cover: Cover, pyramid: Pyramid, positions: Positions, scale: float
) -> tuple[Lists, Sequence[Tensor], Sequence[Tensor], Turn]:
    """A call as kernels take it: lists, keys and values of all levels, rotary tables. What a digest opens is brought
    together first."""
    from mgam.attend.triton.lists import Lists, check
    from mgam.attend.triton.tables import Turn

    _fit(queries, blocks, cover, pyramid, scale)
    lists = Lists.of(cover, blocks, queries.device, positions)
    if not (queries.is_cuda and torch.cuda.is_current_stream_capturing()):
        if cover.known is None:
            check(lists, pyramid.keys[0].shape[0], pyramid.tokens)
        if positions.kind == "granular":
            positions.check(cover.most, cover.reach(blocks))
    keys, values, tokens = pyramid.keys, pyramid.values, pyramid.tokens
    if not pyramid.in_memory and isinstance(pyramid, Elsewhere):
        near = pyramid.near(cover, blocks)
        lists, tokens = lists.near(blocks), near[0].shape[2]
        keys, values = (
            [tokens_of, *(level.expand(len(blocks), -1, -1, -1) for level in kept[1:])]
            for tokens_of, kept in zip(near, (keys, values), strict=True)
        )
    return lists, keys, values, Turn.of(positions, lists, tokens, queries.device, queries.dtype)


def _fit(queries: Tensor, blocks: Blocks, cover: Cover, pyramid: Pyramid, scale: float) -> None:
    keys, values = pyramid.keys, pyramid.values
    heads, dim = keys[0].shape[1], keys[0].shape[3]
    wrong = []
    if (
        queries.ndim != 4
        or queries.shape[0] != len(blocks)
        or queries.shape[2] < blocks.size
        or queries.shape[3] != dim
    ):
        wrong.append(
            f"queries {tuple(queries.shape)} do not hold {len(blocks)} blocks of {blocks.size} queries of {dim}"
        )
    elif queries.shape[1] % heads:
        wrong.append(f"{queries.shape[1]} query heads do not divide among {heads} KV heads")
    if cover.opened.shape[:2] != (len(blocks), heads):
        wrong.append(
            f"a cover of {tuple(cover.opened.shape[:2])} blocks and heads for {len(blocks)} blocks and {heads} heads"
        )
    if len(keys) != cover.levels.top + 1:
        wrong.append(f"a pyramid of {len(keys)} levels for a cover of {cover.levels.top + 1}")
    if any(states.dtype != queries.dtype for states in (*keys, *values)):
        wrong.append(f"keys and values must be {queries.dtype}, as the queries are")
    if any(states.device != queries.device for states in (*keys, *values)):
        wrong.append(f"keys and values must be on {queries.device}, as the queries are")
    if any(states.stride(-1) != 1 and states.numel() for states in (queries, *keys, *values)):
        wrong.append("the head dimension must be contiguous in queries, keys and values")
    if not scale > 0:
        wrong.append(f"scale {scale} must be positive")
    if wrong:
        raise SettingError("cannot attend: " + "; ".join(wrong))

"""The attention function and mask that transformers calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask

from mgam.engine import Plan, read
from mgam.errors import UnsupportedModelError
from mgam.integrations.transformers.cache import PyramidLayer, ensure_layer
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule

if TYPE_CHECKING:
    from mgam.integrations.transformers.apply import Applied

NAME = "mgam"
"""The attention implementation's name in transformers."""


@dataclass
class LayerRuntime:
    """What one attention module needs while it runs: set on the module by `mgam.apply`, filled by its hook at each call."""

    applied: Applied
    layer: int
    cache: PyramidLayer | None = None

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Notes the cache of this call and, for granular positions, hands the module the identity rotation."""
        cache = kwargs.get("past_key_values")
        applied = self.applied
        self.cache = None
        if cache is not None:
            self.cache = ensure_layer(cache, self.layer, applied.reading.levels, applied.settings.block)
        if applied.settings.positions == "granular" and kwargs.get("position_embeddings") is not None:
            cos, sin = kwargs["position_embeddings"]
            kwargs = {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
        return args, kwargs


def register() -> None:
    """Makes the names known to transformers; nothing else is touched."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """A (B, T) mask, or none, for multi-granular layers; sliding layers get the mask that they expect."""
    if local_size is not None:
        return sdpa_mask(*args, local_size=local_size, **kwargs)
    return flash_attention_mask(*args, **kwargs)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Multi-granular attention of one layer.

    Shapes: query (B, Hq, L, D), key and value (B, Hkv, L, D) of the new tokens only; returns (B, L, Hq, D).
    """
    runtime: LayerRuntime | None = getattr(module, "_mgam", None)
    if runtime is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise UnsupportedModelError(f"attention dropout {dropout} is not supported; set config.attention_dropout to 0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    applied, cache = runtime.applied, runtime.cache
    columns = query.shape[2]
    reading = applied.reading_for(runtime.layer, scale)
    if cache is None:
        start, counts = _spans(attention_mask, query.shape[0], columns)
        aligned = [_shift(states, start) for states in (key, value)]
        pyramid = Pyramid.of(*aligned, reading.levels, counts)
        schedules = [Schedule.uniform(applied.settings.block)] * len(counts)
        plan = applied.plan(schedules, [0] * len(counts), counts, columns, [-offset for offset in start])
        out = read(query, pyramid, plan, reading, scale, softcap=softcap, layer=runtime.layer)
    else:
        new = None if attention_mask is None else attention_mask[:, -columns:]
        start, counts = _spans(new, query.shape[0], columns)
        if any(offset + count != columns for offset, count in zip(start, counts, strict=True)):
            raise UnsupportedModelError(
                "the batch is padded on the right; with a cache, rows must be padded on the left (tokenizer.padding_side='left')"
            )
        before = cache.append(key, value, counts)
        plan = applied.plan(cache.schedules, before, counts, columns)
        out = read(
            query,
            cache.pyramid,
            plan,
            reading,
            scale,
            softcap=softcap,
            recent=cache.recent,
            record=cache.record,
            layer=runtime.layer,
        )
        cache.remember(query)
    return out.transpose(1, 2), None


def _spans(attention_mask: Tensor | None, rows: int, columns: int) -> tuple[list[int], list[int]]:
    """First real column and number of real tokens of each row."""
    if attention_mask is None:
        return [0] * rows, [columns] * rows
    if attention_mask.ndim != 2:
        raise UnsupportedModelError(
            f"an attention mask of shape {tuple(attention_mask.shape)} was given; a mask of (rows, tokens) is needed"
        )
    live = attention_mask[:, -columns:].to(torch.bool).cpu()
    counts = live.sum(1)
    start = torch.where(counts > 0, live.to(torch.uint8).argmax(1), columns - counts)
    number = torch.arange(columns)
    whole = (number >= start[:, None]) & (number < (start + counts)[:, None])
    if not torch.equal(whole, live):
        raise UnsupportedModelError("the attention mask has holes; each row's real tokens must stand together")
    return start.tolist(), counts.tolist()


def _shift(states: Tensor, start: list[int]) -> Tensor:
    """Rows (B, H, L, D) moved so that each begins at its first real token."""
    if not any(start):
        return states
    columns = torch.arange(states.shape[2]) + torch.tensor(start)[:, None]
    index = columns.clamp_max(states.shape[2] - 1).to(states.device)
    return states.gather(2, index[:, None, :, None].expand_as(states))


__all__ = ["NAME", "LayerRuntime", "Plan", "attention", "mask", "register"]

"""The teacher: full attention of the frozen model, and the mass that it gives each chunk, without a T x T buffer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mgam.errors import UnsupportedModelError
from mgam.integrations.transformers.models import architecture, attention_layers
from mgam.positions import rotate

NAME = "mgam_teacher"
TILE = 2048
"""Keys whose logits are worked out at a time."""


@dataclass(frozen=True)
class Seen:
    """What one layer computed for a batch of whole texts.

    Shapes: queries (B, H*G, T, D) and keys (B, H, T, D) before rotation, the turned ones after it.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    turned_queries: Tensor
    turned_keys: Tensor
    scale: float
    softcap: float | None


Visit = Callable[[Seen], None]


@dataclass(frozen=True)
class Narrow:
    """One KV head of one layer that reads the sink and the last tokens alone, while all others read in full."""

    layer: int
    head: int
    sink: int
    window: int


@dataclass
class _Watch:
    layer: int
    visit: Visit
    narrow: Narrow | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Takes the rotation into its own hands."""
        places = kwargs.get("position_embeddings")
        if places is None or not getattr(module, "use_rope", True):
            self.cos = self.sin = None
            return args, kwargs
        cos, sin = places
        half = cos.shape[-1] // 2
        self.cos, self.sin = cos[:, None, :, :half], sin[:, None, :, :half]
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


@contextmanager
def watching(model: Any, visit: Visit, narrow: Narrow | None = None) -> Iterator[None]:
    """While it lasts, `model(ids)` on whole unpadded texts shows every full-attention layer's states to `visit`.

    With `narrow` one head reads less than all.

    Raises:
        UnsupportedModelError: an architecture that mgam does not apply to.
    """
    target = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    architecture(target.config)
    if getattr(target, "_mgam_applied", None) is not None:
        raise UnsupportedModelError("the teacher reads densely; call mgam.remove(model) before fitting")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hooks, configs = [], []
    for index, layer in attention_layers(target.get_decoder(), target.config).items():
        if layer.window is not None:
            continue
        module: Any = layer.module
        configs.append((module, module.config))
        module.config = copy.copy(module.config)
        module.config._attn_implementation = NAME
        module._mgam_watch = watch = _Watch(index, visit, narrow if narrow and narrow.layer == index else None)
        hooks.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, config in configs:
            module.config = config
            del module._mgam_watch


def _attention(
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
    """Full causal attention that shows what it computed."""
    watch: _Watch = module._mgam_watch  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    turned_query, turned_key = query, key
    if watch.cos is not None and watch.sin is not None:
        turned_query, turned_key = (rotate(states, watch.cos, watch.sin) for states in (query, key))
    watch.visit(Seen(watch.layer, query, key, turned_query, turned_key, scale, softcap))
    if softcap is not None:
        out = _capped(turned_query, turned_key, value, scale, softcap)
    else:
        out = nn.functional.scaled_dot_product_attention(
            turned_query, turned_key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    if watch.narrow is not None:
        group, head = query.shape[1] // key.shape[1], watch.narrow.head
        mine, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
        own = _narrowed(turned_query[:, mine], turned_key[:, one], value[:, one], scale, softcap, watch.narrow)
        out = torch.cat((out[:, : mine.start], own, out[:, mine.stop :]), 1)
    return out.transpose(1, 2), None


def _narrowed(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, narrow: Narrow) -> Tensor:
    """Attention of queries (B, G, T, D) to sink and window of keys and values (B, 1, T, D), some queries at a time."""
    parts = []
    place = torch.arange(key.shape[2], device=key.device)
    for first in range(0, query.shape[2], 256):
        part = query[:, :, first : first + 256]
        stop = first + part.shape[2]
        near = torch.cat((place[: narrow.sink], place[max(narrow.sink, first + 1 - narrow.window) : stop]))
        logits = (part @ key[:, :, near].transpose(2, 3)).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        own = place[first:stop, None]
        hidden = (near > own) | ((near <= own - narrow.window) & (near >= narrow.sink))
        parts.append(torch.softmax(logits.masked_fill(hidden, -torch.inf), -1).to(value.dtype) @ value[:, :, near])
    return torch.cat(parts, 2)


def _capped(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention with capped logits, some queries at a time."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    parts = []
    place = torch.arange(key.shape[2], device=key.device)
    for first in range(0, query.shape[2], 256):
        part = query[:, :, first : first + 256]
        logits = softcap * torch.tanh(part @ key.transpose(2, 3) * (scale / softcap))
        own = first + torch.arange(part.shape[2], device=key.device)
        logits = logits.masked_fill(place > own[:, None], -torch.inf)
        parts.append(torch.softmax(logits.float(), -1).to(value.dtype) @ value)
    return torch.cat(parts, 2)


def chunk_masses(seen: Seen, places: Tensor, chunk: int) -> Tensor:
    """Share of full attention that queries give each chunk: (B, H, G, n, C), float32.

    Args:
        places: (B, n) positions of the queries in each row.
        chunk: tokens per chunk; an incomplete last chunk counts as one.

    Softmax in streaming form: tiles of keys, and the log of a chunk's sum is all that is kept of its logits.
    """
    keys = seen.turned_keys
    rows, heads, tokens, dim = keys.shape
    index = places[:, None, :, None].expand(-1, seen.turned_queries.shape[1], -1, dim)
    asked = seen.turned_queries.gather(2, index).unflatten(1, (heads, -1))  # (B, H, G, n, D)
    group, count = asked.shape[2:4]
    asked = asked.flatten(2, 3)
    step = max(chunk, TILE // chunk * chunk)
    limit = places.repeat(1, group)[:, None, :, None]
    sums = []
    for first in range(0, tokens, step):
        tile = keys[:, :, first : first + step]
        logits = (asked @ tile.transpose(2, 3)).float() * seen.scale
        if seen.softcap is not None:
            logits = seen.softcap * torch.tanh(logits / seen.softcap)
        own = first + torch.arange(tile.shape[2], device=keys.device)
        logits = logits.masked_fill(own > limit, -torch.inf)
        spare = -tile.shape[2] % chunk
        logits = nn.functional.pad(logits, (0, spare), value=-torch.inf)
        sums.append(torch.logsumexp(logits.unflatten(-1, (-1, chunk)), -1))
    return torch.softmax(torch.cat(sums, -1), -1).view(rows, heads, group, count, -1)

"""The attention function and mask that transformers calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from mgam.engine import read
from mgam.errors import UnsupportedModelError
from mgam.integrations.transformers import calls, local
from mgam.integrations.transformers.cache import ensure_pyramid, ensure_recent
from mgam.integrations.transformers.calls import Call
from mgam.integrations.transformers.pyramid_layer import PyramidLayer
from mgam.integrations.transformers.recent_layer import RecentLayer
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule

if TYPE_CHECKING:
    from mgam.integrations.transformers.apply import Applied

NAME = "mgam"
"""The attention implementation's name in transformers."""

_GRAPH_BREAK = (
    "multi-granular attention chooses what to read from the data, so torch.compile leaves it out of the graph; "
    "compile without fullgraph=True"
)


Function = TypeVar("Function", bound=Callable[..., Any])


def _outside_graphs(function: Function) -> Function:
    return cast(Function, torch.compiler.disable(function, reason=_GRAPH_BREAK))


@dataclass
class LayerRuntime:
    """What one attention module needs while it runs: set on it by `mgam.apply`, filled by its hook at each call."""

    applied: Applied
    layer: int
    window: int | None = None
    """Tokens that a query of a sliding layer reads; None where attention is multi-granular."""
    cache: PyramidLayer | RecentLayer | None = None
    position_ids: Tensor | None = None

    @_outside_graphs
    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Notes the cache of this call and, for granular positions, hands the module the identity rotation."""
        cache, applied = kwargs.get("past_key_values"), self.applied
        applied.begin_call(self.layer)
        self.cache = None
        self.position_ids = kwargs.get("position_ids")
        if kwargs.get("output_attentions"):
            raise UnsupportedModelError(
                "output_attentions=True: attention weights over a cover are not weights over tokens; leave it out"
            )
        if cache is not None and self.window is not None:
            self.cache = ensure_recent(cache, self.layer, self.window)
        elif cache is not None:
            self.cache = ensure_pyramid(cache, self.layer, applied)
        if self.cache is not None:
            self.cache.announced = True
        if self.layer in applied.turned:
            if kwargs.get("position_embeddings") is None:
                raise UnsupportedModelError(
                    f"layer {self.layer} was called without position embeddings, so granular positions cannot take "
                    "their place; apply mgam with positions='absolute'"
                )
            cos, sin = kwargs["position_embeddings"]
            identity = applied.once(("identity", cos, sin), lambda: (torch.ones_like(cos), torch.zeros_like(sin)))
            kwargs = {**kwargs, "position_embeddings": identity}
        return args, kwargs


def register() -> None:
    """Makes the names known to transformers; nothing else is touched.

    Raises:
        UnsupportedModelError: when the name is taken by something else.
    """
    for interface, ours in ((AttentionInterface, attention), (AttentionMaskInterface, mask)):
        there = interface._global_mapping.get(NAME)
        if there is not None and getattr(there, "__module__", None) != __name__:
            raise UnsupportedModelError(
                f"transformers already knows an attention named {NAME!r}, of {getattr(there, '__module__', there)}; "
                "register that one under another name"
            )
        interface.register(NAME, ours)


def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """A (B, T) mask, or none, for every layer: sliding windows are counted in tokens of a row, not in columns."""
    return flash_attention_mask(*args, **kwargs)


@_outside_graphs
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
    """Multi-granular attention of one layer, or a sliding layer's own.

    Shapes: query (B, Hq, L, D), key and value (B, Hkv, L, D) of the new tokens only; returns (B, L, Hq, D).

    Raises:
        UnsupportedModelError: for every mode that cannot be served; nothing is read densely in silence.
    """
    runtime: LayerRuntime | None = getattr(module, "_mgam", None)
    if runtime is None:
        raise UnsupportedModelError(
            f"a {type(module).__name__} was told to use attention {NAME!r}, but mgam was not applied to it; "
            "load the model without attn_implementation and call mgam.apply(model)"
        )
    if dropout:
        raise UnsupportedModelError(
            f"attention dropout {dropout} is not supported; load the model with attention_dropout=0.0, or set "
            "self_attn.attention_dropout to 0.0 in every layer (the configuration alone is read when it is built)"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.cuda.device_of(query):  # kernels are launched on the current device, and layers may lie on another
        cache, runtime.cache = runtime.cache, None  # which whoever called keeps, or lets go
        if cache is None:
            out = _alone(runtime, query, key, value, attention_mask, kwargs.get("cu_seq_lens_q"), scale, softcap)
        else:
            out = _going_on(runtime, cache, query, key, value, attention_mask, scale, softcap)
    return out.transpose(1, 2), None


def _alone(
    runtime: LayerRuntime,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    borders: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Whole texts in one pass."""
    applied = runtime.applied
    rows, columns = query.shape[0], query.shape[2]
    call = applied.once(
        ("alone", attention_mask, runtime.position_ids, borders, rows, columns),
        lambda: calls.alone(attention_mask, runtime.position_ids, borders, rows, columns, applied.ranked),
    )
    whole = call.plain
    out = query if whole else torch.zeros_like(query)
    for texts in call.groups():
        counts = [call.counts[text] for text in texts]
        if not any(counts):
            continue
        q, k, v = (call.take(states, texts) for states in (query, key, value))
        if runtime.window is not None:
            got = local.attend(q, k, v, [q.shape[2]] * len(texts), runtime.window, scale, softcap)
        else:
            reading = applied.reading_for(runtime.layer, scale)
            schedules = [applied.schedule or Schedule.uniform(applied.settings.block)] * len(texts)
            plan = applied.plan(schedules, [0] * len(texts), counts, q.shape[2], [0] * len(texts))
            got = read(
                q, Pyramid.of(k, v, reading.levels, counts), plan, reading, scale, softcap=softcap, layer=runtime.layer
            )
        if whole:
            return got
        call.put(out, got, texts)
    return torch.zeros_like(query) if whole else out


def _going_on(
    runtime: LayerRuntime,
    cache: PyramidLayer | RecentLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """New tokens of texts whose past is in a cache."""
    applied = runtime.applied
    rows, columns = query.shape[0], query.shape[2]
    call = _new_tokens(runtime, cache, attention_mask, rows, columns)
    if isinstance(cache, RecentLayer):
        keys, values, held = cache.append(key, value, call.counts)
        out = local.attend(query, keys, values, held, cache.window, scale, softcap)
        if min(call.counts) == columns:
            return out
        live = torch.arange(columns) >= torch.tensor(call.start)[:, None]
        return out.masked_fill(~live.to(out.device)[:, None, :, None], 0)
    reading = applied.reading_for(runtime.layer, scale)
    before = cache.append(key, value, call.counts)
    plan = applied.plan(cache.schedules, before, call.counts, columns)
    if reading.policy.votes:
        cache.check_votes(plan)
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
    cache.remember(query, call.counts)
    return out


def _new_tokens(
    runtime: LayerRuntime, cache: PyramidLayer | RecentLayer, attention_mask: Tensor | None, rows: int, columns: int
) -> Call:
    """Which columns of the call are new tokens, found once for all layers."""
    applied = runtime.applied
    before = tuple(cache.lengths or [0] * rows)
    if len(before) != rows:
        raise UnsupportedModelError(
            f"a cache that holds {len(before)} rows was given {rows}; repeat its rows with batch_repeat_interleave"
        )
    ahead = tuple(cache.ahead or [0] * rows)
    expected = tuple(cache.next_position or [None] * rows)
    positions = runtime.position_ids

    def find() -> tuple[Call, list[int | None]]:
        call, live = calls.going_on(attention_mask, rows, columns, cache.columns, before, ahead)
        if positions is None or not applied.ranked:
            applied.check_stretch(before, call.counts)
            return call, list(expected)
        return call, calls.check_positions(positions, live, call, expected)

    key = ("going on", attention_mask, positions, rows, columns, cache.columns, before, ahead, expected)
    call, cache.next_position = applied.once(key, find)
    return call


__all__ = ["NAME", "Call", "LayerRuntime", "attention", "mask", "register"]

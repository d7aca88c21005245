"""`apply` and `remove`: make a model read multi-granularly, and undo it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mgam import methods
from mgam.engine import Plan, Reading
from mgam.errors import SettingError, UnsupportedModelError
from mgam.integrations.transformers import attention
from mgam.integrations.transformers.cache import PyramidCache
from mgam.integrations.transformers.models import Architecture, architecture, full_attention_layers
from mgam.policies import Policy
from mgam.positions import Positions, Rotary
from mgam.schedule import Schedule
from mgam.settings import Settings

Model = TypeVar("Model", bound=nn.Module)

LONG_PROMPT = 4096
"""Prompts longer than this are read in calls of `PREFILL` tokens, so that a layer's activations stay small."""
PREFILL = 2048


@dataclass
class Applied:
    """What `mgam.apply` did to a model: its settings, how its layers read, and how to undo it."""

    settings: Settings
    method: methods.Method
    row: Architecture
    trained_window: int
    reading: Reading
    layers: dict[int, nn.Module]
    previous: str
    hooks: list[Any] = field(default_factory=list)
    _plans: dict[Any, Plan] = field(default_factory=dict)

    def reading_for(self, layer: int, scale: float) -> Reading:
        """How one layer reads: the policy learns the layer's scale."""
        key = ("reading", layer, scale)
        if key not in self._readings:
            self._readings[key] = replace(self.reading, policy=self.make_policy(scale))
        return self._readings[key]

    def make_policy(self, scale: float) -> Policy:
        """A policy for layers with this attention scale."""
        return self.method.policy(self.settings, scale)

    def __post_init__(self) -> None:
        self._readings: dict[Any, Reading] = {}

    def plan(
        self,
        schedules: Sequence[Schedule],
        before: Sequence[int],
        counts: Sequence[int],
        columns: int,
        first: Sequence[int] | None = None,
    ) -> Plan:
        """The plan of a call, made once for all layers."""
        key = (tuple(schedules), tuple(before), tuple(counts), columns, None if first is None else tuple(first))
        if key not in self._plans:
            self._plans.clear()
            self._plans[key] = Plan.of(schedules, before, counts, columns, self.reading.dense_until, first)
        return self._plans[key]


def apply(model: Model, method: str = "mgam", *, budget: int = 1024, **settings: Any) -> Model:
    """Makes a transformers decoder read its context with the given method, in place.

    After it, `model(...)`, `model.generate(...)`, Trainer and pipelines work as before. `mgam.remove(model)` undoes it.

    Args:
        model: a causal language model of a supported architecture.
        method: a name from `mgam methods`.
        budget: tokens that a query may read in full outside window and sink.
        settings: further fields of `mgam.Settings`.

    Raises:
        UnsupportedModelError: the architecture, or the mode, is refused; every reason is given.
        SettingError: a setting cannot work; the message names the range.
    """
    chosen = methods.get(method)
    wanted = chosen.settings(budget=budget, **settings)
    if wanted.positions not in chosen.positions:
        raise SettingError(
            f"method {method!r} works with positions {' or '.join(chosen.positions)}, not {wanted.positions!r}"
        )
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModelError(
            f"a {type(model).__name__} was given; mgam applies to a transformers causal language model"
        )
    text_config = config.get_text_config(decoder=True)
    row = architecture(text_config)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = full_attention_layers(decoder, text_config)
    remove(model)
    window = row.trained_window(text_config)
    dense_until = min(2048, window) if wanted.dense_until is None else wanted.dense_until
    if dense_until > window and wanted.positions == "granular" and method != "dense":
        raise SettingError(
            f"dense_until={dense_until} is beyond the {window} positions that the model was trained for; choose at most {window}"
        )
    reading = Reading(
        policy=chosen.policy(wanted, 1.0),
        levels=wanted.pyramid_levels,
        positions=_positions(wanted, row, decoder, window, next(iter(layers))),
        dense_until=dense_until,
        backend=wanted.backend,
    )
    attention.register()
    applied = Applied(wanted, chosen, row, window, reading, layers, model.config._attn_implementation)
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take attention implementations from transformers' registry"
        )
    for index, module in layers.items():
        runtime = attention.LayerRuntime(applied, index)
        module._mgam = runtime  # type: ignore[assignment]
        applied.hooks.append(module.register_forward_pre_hook(runtime.enter, with_kwargs=True))
    model._mgam_applied = applied  # type: ignore[assignment]
    if hasattr(model, "generate"):
        model.generate = functools.partial(_generate, model)  # type: ignore[assignment]
    return model


def remove(model: Model) -> Model:
    """Undoes `apply`; a model that it was not called on is left alone."""
    applied: Applied | None = getattr(model, "_mgam_applied", None)
    if applied is None:
        return model
    for hook in applied.hooks:
        hook.remove()
    for module in applied.layers.values():
        del module._mgam
    model.set_attn_implementation(applied.previous)  # type: ignore[operator]
    del model._mgam_applied
    model.__dict__.pop("generate", None)
    return model


def applied_to(model: nn.Module) -> Applied:
    """What was applied to a model.

    Raises:
        SettingError: when nothing was.
    """
    applied: Applied | None = getattr(model, "_mgam_applied", None)
    if applied is None:
        raise SettingError("mgam was not applied to this model; call mgam.apply(model) first")
    return applied


def _positions(settings: Settings, row: Architecture, decoder: nn.Module, window: int, layer: int) -> Positions:
    if settings.positions == "absolute":
        return Positions()
    module = row.rotary(decoder, layer)
    if module is None:
        return Positions()

    def tables(places: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(1, device=places.device, dtype=torch.float32)
        cos, sin = module(like, places[None])
        return cos[0], sin[0]

    levels = settings.pyramid_levels
    return Positions.granular(Rotary(tables, window), settings.window + levels.chunk + settings.block)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` with a pyramid cache whose schedule knows where the prompt ends."""
    applied = applied_to(model)
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if kwargs.get("cache_implementation") is not None:
        raise UnsupportedModelError(
            f"cache_implementation={kwargs['cache_implementation']!r} cannot hold pyramids; leave it out, mgam brings its own cache"
        )
    if kwargs.get("past_key_values") is None and kwargs.get("use_cache", True) and ids is not None:
        mask = kwargs.get("attention_mask")
        lengths = [ids.shape[1]] * ids.shape[0] if mask is None else mask.sum(1).tolist()
        kwargs["past_key_values"] = PyramidCache(model, [_prompt(applied.settings, int(length)) for length in lengths])
        if ids.shape[1] > LONG_PROMPT and not kwargs.get("prefill_chunk_size"):
            kwargs["prefill_chunk_size"] = PREFILL
    return type(model).generate(model, *args, **kwargs)


def _prompt(settings: Settings, length: int) -> Schedule:
    """The schedule of a prompt of unknown make-up: its last tokens are taken for the question."""
    question = min(settings.question_block, length)
    return Schedule.reading(
        length - question,
        question,
        block=settings.block,
        question_block=settings.question_block,
        lookahead=settings.lookahead,
    )

"""`apply` and `remove`: make a model read multi-granularly, and undo it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from mgam import methods
from mgam.attend.dispatch import check_name
from mgam.engine import Reading
from mgam.errors import SettingError, UnsupportedModelError
from mgam.integrations.transformers import attention, low_rank, prefill
from mgam.integrations.transformers.fitted import adapters_of, fit_to
from mgam.integrations.transformers.models import Architecture, Attention, architecture, attention_layers
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies import PerLayer, Policy
from mgam.policies.base import of_layer
from mgam.policies.fixed import Opened
from mgam.positions import Positions, Rotary
from mgam.schedule import Schedule
from mgam.settings import Dials, Settings

Model = TypeVar("Model", bound=nn.Module)

QUESTION_SHARE, WIDEST_QUESTION = 8, 4096
"""Questions may read an eighth of the trained window in full, and at most so many tokens, if nothing else is said."""
STRETCHED = ("longrope", "dynamic")
"""Rotations that change with the length of the text."""


@dataclass
class Applied:
    """What `mgam.apply` did to a model: its settings, how its layers read, and how to undo it."""

    settings: Settings
    method: methods.Method
    row: Architecture
    trained_window: int
    reading: Reading
    layers: dict[int, nn.Module]
    """Attention modules that became multi-granular."""
    previous: str
    windows: dict[int, int | None] = field(default_factory=dict)
    """Every attention layer: the tokens that a sliding one reads, None for multi-granular ones."""
    positions: dict[int, Positions] = field(default_factory=dict)
    """Per multi-granular layer; a layer without rotation has absolute ones."""
    stretched: bool = False
    """Whether the model's rotation changes with the length of the text."""
    schedule: Schedule | None = None
    """Of whole texts without a cache, where they are not to be read in uniform blocks."""
    hooks: list[Any] = field(default_factory=list)
    _open: Policy | None = None
    """Who chooses for all layers in place of the method, while everything is read in full."""
    _plan: tuple[Any, Plan] | None = None
    _readings: dict[Any, Reading] = field(default_factory=dict)
    _known: list[tuple[tuple[Any, ...], Any]] = field(default_factory=list)

    @functools.cached_property
    def turned(self) -> set[int]:
        """Layers whose module gets the identity rotation, since reading rotates by rank."""
        return {index for index, place in self.positions.items() if place.kind == "granular"}

    @functools.cached_property
    def ranked(self) -> bool:
        """Whether any layer places entries by rank."""
        return bool(self.turned)

    def reading_for(self, layer: int, scale: float) -> Reading:
        """How one layer reads: its positions, and a policy that knows its scale."""
        key = (layer, scale)
        if key not in self._readings:
            self._readings[key] = replace(
                self.reading,
                policy=self._open or of_layer(self.make_policy(scale), layer),
                asking=None if self._open else self._asking(scale, layer),
                positions=self.positions.get(layer, self.reading.positions),
            )
        return self._readings[key]

    @contextmanager
    def in_full(self, chunk: int) -> Iterator[None]:
        """Meanwhile everything is read in full, in chunks of so many tokens, so that a record tells the attention that
        each of them gets. Caches that were made before cannot be read from."""
        kept = self.reading, self._readings
        window = self.settings.window + self.settings.pyramid_levels.chunk - chunk
        self._open = Opened(max(0, min(Opened.window, window)))  # within what positions were made for
        self.reading = replace(self.reading, policy=self._open, levels=Levels((1, chunk)), dense_until=0)
        self._readings, self._plan = {}, None
        try:
            yield
        finally:
            (self.reading, self._readings), self._open, self._plan = kept, None, None

    def make_policy(self, scale: float) -> Policy | PerLayer:
        """The policy, or those of the layers, for this attention scale."""
        return self.method.policy(self.settings, scale)

    @property
    def question_budget(self) -> int:
        """Tokens that a query after the text may read in full."""
        chosen = self.settings
        if chosen.question_budget is not None or not self.method.searches:
            return chosen.budget if chosen.question_budget is None else chosen.question_budget
        return max(chosen.budget, min(WIDEST_QUESTION, self.trained_window // QUESTION_SHARE))

    def _asking(self, scale: float, layer: int) -> Policy | None:
        """The policy of questions and answers, where they have a budget of their own."""
        budget = self.question_budget
        if budget == self.settings.budget:
            return None
        return of_layer(self.method.policy(replace(self.settings, budget=budget), scale), layer)

    def plan(
        self,
        schedules: Sequence[Schedule],
        before: Sequence[int],
        counts: Sequence[int],
        columns: int,
        first: Sequence[int] | None = None,
    ) -> Plan:
        """The plan of a call, made once for all layers.

        One of `torch.inference_mode` does not serve calls outside: what follows from it is kept with it.
        """
        texts = None if first is None else tuple(first)
        key = (tuple(schedules), tuple(before), tuple(counts), columns, texts, torch.is_inference_mode_enabled())
        if self._plan is None or self._plan[0] != key:  # layers share their schedules: nothing is hashed
            reading = self.reading
            made = Plan.of(
                schedules, before, counts, columns, reading.dense_until, first, dense_prompt=reading.dense_prompt
            )
            self._plan = key, made
        return self._plan[1]

    def begin_call(self, layer: int) -> None:
        """Forgets what was found about the last call when the first layer begins another."""
        if layer == next(iter(self.windows)):
            self._known.clear()

    def once(self, key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        """What `find` gives, found once for all layers of a call. Tensors in the key count by identity."""
        for known, value in self._known:
            if len(known) == len(key) and all(map(_same, known, key)):
                return value
        value = find()
        self._known = [*self._known[-3:], (key, value)]
        return value

    def check_stretch(self, before: Sequence[int], counts: Sequence[int]) -> None:
        """Refuses keys of two rotations in one text.

        Raises:
            UnsupportedModelError: when a text grows past the trained window of a model that then rotates otherwise.
        """
        if not self.stretched or self.ranked:
            return
        window = self.trained_window
        if any(0 < old <= window < old + new for old, new in zip(before, counts, strict=True)):
            raise UnsupportedModelError(
                f"the text grows past {window} tokens, where this model rotates otherwise than before, so that its "
                "kept keys would be wrong; apply mgam with positions='granular'"
            )


def apply(
    model: Model, method: str | Settings = "mgam", *, budget: int | None = None, **settings: Unpack[Dials]
) -> Model:
    """Makes a transformers decoder read its context with the given method, in place.

    After it, `model(...)`, `model.generate(...)`, Trainer, PEFT and pipelines work as before.
    `mgam.remove(model)` undoes it.

    Args:
        model: a causal language model of a supported architecture, with or without PEFT adapters.
        method: a name from `mgam methods`, or whole `mgam.Settings`, of which others given here change single ones.
        budget: tokens that a query may read in full outside window and sink; None: the method's own.
        settings: further fields of `mgam.Settings`.

    Raises:
        UnsupportedModelError: the architecture, or the mode, is refused; every reason is given.
        SettingError: a setting cannot work; the message names the range.
    """
    given: dict[str, Any] = {**({} if budget is None else {"budget": budget}), **settings}
    if isinstance(method, Settings):
        given = method.as_dict() | given
        method = given.pop("method")
    if not isinstance(method, str):
        raise SettingError(f"method={method!r} must be a name from `mgam methods`, or mgam.Settings")
    chosen = methods.get(method)
    wanted = chosen.settings(**given)
    check_name(wanted.backend)
    target = _target(model)
    config = target.config
    row = architecture(config)
    decoder = target.get_decoder()
    layers = attention_layers(decoder, config)
    window = row.trained_window(config)
    dense_until = min(4096, window) if wanted.dense_until is None else wanted.dense_until
    if dense_until > window and wanted.positions == "granular" and method != "dense":
        raise SettingError(
            f"dense_until={dense_until} is beyond the {window} positions that the model was trained for; "
            f"choose at most {window}"
        )
    additions = [one for folder in adapters_of(fit_to(target, wanted), wanted) for one in low_rank.read(target, folder)]
    places = _positions(wanted, row, decoder, window, layers)
    reading = Reading(
        policy=of_layer(chosen.policy(wanted, 1.0), next((at for at, one in layers.items() if one.window is None), 0)),
        levels=wanted.pyramid_levels,
        positions=next((place for place in places.values() if place.kind == "granular"), Positions()),
        dense_until=dense_until,
        backend=wanted.backend,
        dense_prompt=chosen.phase == "decode",
    )
    attention.register()
    remove(model)  # once nothing more can be refused for the settings' sake
    applied = Applied(
        wanted,
        chosen,
        row,
        window,
        reading,
        {index: layer.module for index, layer in layers.items() if layer.window is None},
        target.config._attn_implementation,
        {index: layer.window for index, layer in layers.items()},
        places,
        (getattr(config, "rope_parameters", None) or {}).get("rope_type") in STRETCHED,
    )
    target._mgam_applied = applied
    try:
        _install(target, applied, layers, additions)
    except BaseException:
        remove(model)
        raise
    return model


def _install(
    target: Any,
    applied: Applied,
    layers: dict[int, Attention],
    additions: Sequence[tuple[nn.Module, low_rank.Addition]],
) -> None:
    """Hands the model's attention, and `generate`, to mgam."""
    target.set_attn_implementation(attention.NAME)
    if target.config._attn_implementation != attention.NAME:
        raise UnsupportedModelError(
            f"{type(target).__name__} does not take attention implementations from transformers' registry"
        )
    for index, layer in layers.items():
        runtime = attention.LayerRuntime(applied, index, layer.window)
        layer.module._mgam = runtime  # type: ignore[assignment]
        applied.hooks.append(layer.module.register_forward_pre_hook(runtime.enter, with_kwargs=True))
    applied.hooks += low_rank.attach(additions)
    if hasattr(target, "generate"):
        target.generate = functools.partial(_generate, target)
        if applied.stretched and applied.ranked:
            # Phi-3 drops its cache where its rotation changes; ranks never get there.
            target.prepare_inputs_for_generation = functools.partial(
                GenerationMixin.prepare_inputs_for_generation, target
            )


@contextmanager
def applied(
    model: Model, method: str | Settings = "mgam", *, budget: int | None = None, **settings: Unpack[Dials]
) -> Iterator[Model]:
    """`apply` for the length of a `with` block; what was applied before is applied again after it.

    Raises:
        UnsupportedModelError, SettingError: as `apply` does.
    """
    before: Applied | None = getattr(_base(model), "_mgam_applied", None)
    try:
        yield apply(model, method, budget=budget, **settings)
    finally:
        remove(model)
        if before is not None:
            apply(model, before.settings)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return bool(one == other)


def _base(model: Any) -> Any:
    """The model inside adapters."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _target(model: Any) -> Any:
    """The transformers model inside adapters.

    Raises:
        UnsupportedModelError: when it is none.
    """
    target = _base(model)
    config = getattr(target, "config", None)
    if config is None or not hasattr(target, "set_attn_implementation") or not hasattr(target, "get_decoder"):
        raise UnsupportedModelError(
            f"a {type(model).__name__} was given; mgam applies to a transformers causal language model"
        )
    if config.get_text_config(decoder=True) is not config and not getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(target).__name__} reads more than text (its text model is "
            f"{config.get_text_config(decoder=True).model_type!r}): images are read in both directions, which covers "
            "do not know; load the text model alone"
        )
    return target


def remove(model: Model) -> Model:
    """Undoes `apply`; a model that it was not called on is left alone."""
    target: Any = _base(model)
    there: Applied | None = getattr(target, "_mgam_applied", None)
    if there is None:
        return model
    for hook in there.hooks:
        hook.remove()
    for layer in target.get_decoder().layers:
        layer.self_attn.__dict__.pop("_mgam", None)
    del target._mgam_applied
    target.__dict__.pop("generate", None)
    target.__dict__.pop("prepare_inputs_for_generation", None)
    target.set_attn_implementation(there.previous)
    return model


def applied_to(model: nn.Module) -> Applied:
    """What was applied to a model.

    Raises:
        SettingError: when nothing was.
    """
    there: Applied | None = getattr(_base(model), "_mgam_applied", None)
    if there is None:
        raise SettingError("mgam was not applied to this model; call mgam.apply(model) first")
    return there


def _positions(
    settings: Settings, row: Architecture, decoder: nn.Module, window: int, layers: dict[int, Attention]
) -> dict[int, Positions]:
    """Positions of each multi-granular layer; layers of one kind share their tables."""
    found: dict[int, Positions] = {}
    shared: dict[str, Positions] = {}
    span = settings.window + settings.pyramid_levels.chunk + max(settings.block, settings.question_block)
    for index, layer in layers.items():
        if layer.window is not None:
            continue
        turn = row.rotary(decoder, layer) if settings.positions == "granular" else None
        if turn is None:
            found[index] = Positions()
            continue
        if layer.kind not in shared:
            shared[layer.kind] = Positions.granular(Rotary(_tables(turn), window), span)
        found[index] = shared[layer.kind]
    return found


def _tables(turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def tables(places: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(1, device=places.device, dtype=torch.float32)
        cos, sin = turn(like, places[None])
        return cos[0].to(places.device), sin[0].to(places.device)

    return tables


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` with a pyramid cache whose schedule knows where the prompt ends; long prompts are read in calls."""
    kwargs = prefill.prepare(model, applied_to(model), args, kwargs)
    return type(model).generate(model, *args, **kwargs)

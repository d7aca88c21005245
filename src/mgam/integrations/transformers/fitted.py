"""What a learned policy must know of a model, and whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mgam.integrations.transformers.low_rank import adapters
from mgam.integrations.transformers.models import attention_layers
from mgam.policies.files import FittedPolicy, ModelShape, resolve
from mgam.settings import Settings

SAMPLE = 4096
"""Weights of a matrix that are looked at."""


def fit_to(model: Any, settings: Settings) -> FittedPolicy | None:
    """The learned policy that the settings name, checked against the model; None where they name none.

    Raises:
        SettingError: no such policy, or one of another model.
    """
    if settings.policy is None:
        return None
    fitted = FittedPolicy.load(resolve(settings.policy))
    fitted.check(shape_of(model), settings.search)
    return fitted


def adapters_of(fitted: FittedPolicy | None, settings: Settings) -> list[Path]:
    """Folders whose low-rank adapters the model reads with: the policy's own, and those that the settings name.

    Raises:
        SettingError: no such adapters.
    """
    found = [fitted.folder] if fitted is not None and fitted.folder is not None else []
    if settings.adapter is not None:
        folder = adapters(settings.adapter)
        found += [folder] if folder not in found else []
    return found


@torch.no_grad()
def shape_of(model: Any) -> ModelShape:
    """The shape of a transformers decoder, for policies."""
    config = model.config
    layers, sizes = {}, {}
    for index, layer in attention_layers(model.get_decoder(), config).items():
        if layer.window is not None:
            continue
        module: Any = layer.module
        heads = int(getattr(module, "num_key_value_heads", None) or config.num_key_value_heads)
        group = int(config.num_attention_heads) // heads
        dim = int(getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        layers[str(index)] = (heads, group, dim)
        sizes[str(index)] = _size(module)
    return ModelShape(str(config.model_type), int(config.vocab_size), layers, sizes)


def _size(module: Any) -> float:
    """Mean absolute weight of an attention module, apart from what adapters add."""
    total, count = 0.0, 0
    for name, weight in sorted(module.named_parameters()):
        if weight.dim() != 2 or "lora" in name:
            continue
        flat = weight.reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLE)].float().abs()
        total, count = total + float(some.sum()), count + some.numel()
    return round(total / max(1, count), 7)

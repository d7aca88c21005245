"""The table of models: adding an architecture is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mgam.errors import UnsupportedModelError


@dataclass(frozen=True)
class Architecture:
    """How to find the parts of a decoder that attention needs."""

    model_type: str
    """`config.model_type` of the text model."""
    trained_window: Callable[[Any], int]
    """Positions that the model was trained for, from its configuration."""
    rotary: Callable[[nn.Module, int], nn.Module | None] = lambda decoder, layer: decoder.rotary_emb  # type: ignore[assignment,return-value]
    """Rotary module of a layer; None for a layer without rotation."""
    softcap: Callable[[Any], float | None] = lambda config: None
    """Cap of attention logits."""


def _window(config: Any) -> int:
    """Positions before any scaling of the rotation stretches them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings") if isinstance(parameters, dict) else None
    return int(original or config.max_position_embeddings)


TABLE: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama", _window),
        Architecture("qwen2", _window),
    )
}


def architecture(config: Any) -> Architecture:
    """The row for a configuration.

    Raises:
        UnsupportedModelError: with the model types that are supported and the place to add one.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in TABLE:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not in the table of architectures ({', '.join(sorted(TABLE))}); "
            "add a row to TABLE in mgam/integrations/transformers/models.py (CONTRIBUTING.md, 'add a model')"
        )
    return TABLE[model_type]


def full_attention_layers(decoder: nn.Module, config: Any) -> dict[int, nn.Module]:
    """Attention modules of the layers with full attention, by layer index; sliding layers keep their own attention."""
    kinds = getattr(config, "layer_types", None)
    found = {}
    for index, layer in enumerate(decoder.layers):  # type: ignore[arg-type,union-attr]
        kind = kinds[index] if kinds else "full_attention"
        if kind == "full_attention":
            found[index] = layer.self_attn
        elif kind not in ("sliding_attention", "chunked_attention"):
            raise UnsupportedModelError(
                f"layer {index} is of kind {kind!r}: native sparse, linear or recurrent layers cannot become multi-granular; "
                "use a model whose layers are full or sliding attention"
            )
    if not found:
        raise UnsupportedModelError(
            "the model has no layer with full attention, so there is nothing to make multi-granular"
        )
    return found

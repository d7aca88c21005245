"""The table of models: adding an architecture is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mgam.errors import UnsupportedModelError

Turn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A tensor of the wanted type and device, and positions (1, P) -> cos and sin, each (1, P, R)."""

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Attention:
    """One attention layer of a decoder: the module that transformers calls, and what kind of layer it is."""

    module: nn.Module
    kind: str
    window: int | None = None
    """Tokens that a query of a sliding layer reads, itself included; None for full attention."""


def _window(config: Any) -> int:
    """Positions before any scaling of the rotation stretches them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings") if isinstance(parameters, dict) else None
    original = original or getattr(config, "original_max_position_embeddings", None)
    return int(original or config.max_position_embeddings)


def _one_rotation(decoder: Any, layer: Attention) -> Turn | None:
    """One rotary module for all layers; a layer with `use_rope` off has none."""
    return decoder.rotary_emb if getattr(layer.module, "use_rope", True) else None


def _rotation_by_kind(decoder: Any, layer: Attention) -> Turn | None:
    """One rotary module that is told the kind of layer."""
    return partial(_told, decoder.rotary_emb, layer.kind)


def _told(module: nn.Module, kind: str, like: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    return module(like, places, kind)


def _nothing(config: Any) -> list[str]:
    return []


def _both_ways(config: Any) -> list[str]:
    if getattr(config, "use_bidirectional_attention", None):
        return ["use_bidirectional_attention is set: it is not a causal decoder"]
    return []


@dataclass(frozen=True)
class Architecture:
    """How to find the parts of a decoder that attention needs. The defaults are those of Llama."""

    model_type: str
    """`config.model_type` of the text model."""
    known_as: str
    """Checkpoints that people know it by."""
    trained_window: Callable[[Any], int] = _window
    """Positions that the model was trained for, from its configuration."""
    rotary: Callable[[Any, Attention], Turn | None] = _one_rotation
    """Rotation of a layer; None for a layer without rotation."""
    refuse: Callable[[Any], list[str]] = _nothing
    """Reasons why a configuration of this type cannot be served."""
    odd: str = ""
    """What is unlike Llama, in words."""


TABLE: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama", "Llama 2 and 3, SmolLM2, TinyLlama, Yi"),
        Architecture(
            "mistral", "Mistral 7B v0.2 and later, Nemo", odd="a checkpoint may slide in every layer (refused)"
        ),
        Architecture("qwen2", "Qwen 2, Qwen 2.5", odd="biased projections; upper layers may slide"),
        Architecture("qwen3", "Qwen 3", odd="queries and keys are normed per head"),
        Architecture("qwen3_moe", "Qwen 3 30B-A3B, 235B-A22B", odd="mixture of experts"),
        Architecture("phi3", "Phi-3, Phi-3.5, Phi-4", odd="longrope, partial rotation, fused projections"),
        Architecture("gemma2", "Gemma 2", odd="capped logits, every second layer slides"),
        Architecture(
            "gemma3_text",
            "Gemma 3 1B, 270M",
            rotary=_rotation_by_kind,
            refuse=_both_ways,
            odd="five layers of six slide, a rotation per kind of layer",
        ),
        Architecture("olmo2", "OLMo 2", odd="whole queries and keys are normed, norms after the layers"),
        Architecture("granite", "Granite 3", odd="its own attention multiplier"),
        Architecture("smollm3", "SmolLM3", odd="every fourth layer has no rotation"),
    )
}

NATIVE: dict[str, str] = {
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"),
        "recurrent: it keeps a state, not keys and values that could be read at several granularities",
    ),
    **dict.fromkeys(
        ("jamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid"),
        "a mixture of recurrent and attention layers, which share a cache that cannot hold pyramids",
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe", "minimax", "lfm2", "lfm2_moe", "kimi_linear", "olmo_hybrid"),
        "a mixture of linear (or convolution) and attention layers, which share a cache that cannot hold pyramids",
    ),
    **dict.fromkeys(
        ("deepseek_v32", "deepseek_v4", "glm_moe_dsa", "minimax_m3", "minimax_m3_vl"),
        "sparse by training: it has its own search and its own cache",
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "latent attention: keys exist only inside its own cache"),
}
"""Model types that are refused for what they are, and why."""


def architecture(config: Any) -> Architecture:
    """The row for a configuration.

    Raises:
        UnsupportedModelError: with every reason; for an unknown type, with the place to add it.
    """
    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model type {model_type!r} has an encoder; mgam applies to decoders only")
    if model_type in NATIVE:
        raise UnsupportedModelError(f"model type {model_type!r} is {NATIVE[model_type]}")
    if model_type not in TABLE:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not in the table of architectures ({', '.join(sorted(TABLE))}); "
            "add a row to TABLE in mgam/integrations/transformers/models.py (CONTRIBUTING.md, 'Add a model')"
        )
    row = TABLE[model_type]
    if reasons := row.refuse(config):
        raise UnsupportedModelError(f"this {model_type} model cannot be served: {'; '.join(reasons)}")
    return row


def attention_layers(decoder: nn.Module, config: Any) -> dict[int, Attention]:
    """Every attention layer by index. Full ones become multi-granular, sliding ones stay as they are.

    Raises:
        UnsupportedModelError: when a layer is of another kind, or no layer has full attention.
    """
    found = {}
    for index, layer in enumerate(decoder.layers):  # type: ignore[arg-type]
        kind = _kind(config, index)
        if kind not in (FULL, SLIDING):
            raise UnsupportedModelError(
                f"layer {index} is of kind {kind!r}: native sparse, linear or recurrent layers cannot become "
                "multi-granular; use a model whose layers are full or sliding attention"
            )
        found[index] = Attention(layer.self_attn, kind, int(config.sliding_window) if kind == SLIDING else None)
    if all(layer.kind == SLIDING for layer in found.values()):
        raise UnsupportedModelError(
            f"every layer reads a sliding window of {config.sliding_window} tokens, so there is nothing to make "
            "multi-granular; use a checkpoint with full attention (config.sliding_window is None)"
        )
    return found


def _kind(config: Any, index: int) -> str:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return str(kinds[index])
    return SLIDING if getattr(config, "sliding_window", None) else FULL

"""The table of tiny models: one row per architecture. Adding a model means adding a row here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "levels": (1, 4, 16),
    "search": 2,
    "window": 8,
    "block": 8,
    "question_block": 5,
    "dense_until": 0,
}
"""Settings under which texts of some dozen tokens are already read coarsely."""
ENOUGH = 4096
"""A budget beyond the length of any text here."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
}


@dataclass(frozen=True)
class Tiny:
    """A tiny random model of one architecture."""

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    dense: str = "sdpa"
    """The attention of transformers that it is compared with."""
    finest: torch.dtype = torch.float64
    """The most precise type that transformers runs it in."""
    rough: float = 1e-9
    """Difference that transformers' own rounding makes in that type."""

    def make(self, dtype: torch.dtype | None = None, seed: int = 0, **changes: Any) -> Any:
        """The same weights for the same seed, each time a new model."""
        torch.manual_seed(seed)
        values = {**COMMON, **self.config, **changes}
        config = AutoConfig.for_model(self.model_type, **values)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or self.finest, attn_implementation=self.dense)
        return model.eval()


LAYERS_4 = {"num_hidden_layers": 4}
ZOO = [
    Tiny("llama", "llama"),
    Tiny("mistral", "mistral", {"sliding_window": None}),
    Tiny("qwen2", "qwen2"),
    Tiny(
        "qwen2-sliding",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
    ),
    Tiny("qwen3", "qwen3", {"head_dim": 16}),
    Tiny(
        "qwen3-moe",
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        finest=torch.float32,  # its grouped matrix product knows no finer one
        rough=2e-5,
    ),
    Tiny(
        "phi3",
        "phi3",
        {
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
            "sliding_window": None,
            "hidden_size": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "original_max_position_embeddings": 512,
            },
        },
    ),
    Tiny(
        "gemma2",
        "gemma2",
        {**LAYERS_4, "head_dim": 8, "sliding_window": 10, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
        dense="eager",
        rough=1e-5,  # eager attention takes its softmax in float32
    ),
    Tiny(
        "gemma3",
        "gemma3_text",
        {**LAYERS_4, "head_dim": 8, "sliding_window": 10, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    ),
    Tiny("olmo2", "olmo2"),
    Tiny("granite", "granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    Tiny("smollm3", "smollm3", {**LAYERS_4, "no_rope_layer_interval": 2, "use_sliding_window": False}),
]
NAMES = [tiny.name for tiny in ZOO]
BY_NAME = {tiny.name: tiny for tiny in ZOO}


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random text (rows, length) without padding tokens."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

"""What a digest asks of a model: which it can hold, and whether it is the one that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mgam.documents import fingerprint
from mgam.documents.store.layout import CODES, Shape
from mgam.documents.store.manifest import Manifest
from mgam.errors import DigestError, UnsupportedModelError
from mgam.integrations.transformers import Applied
from mgam.policies import Dyadic, Full, Scored, Window
from mgam.policies.base import Observing
from mgam.settings import Settings

SERVED = (Scored, Window, Dyadic, Full)
"""Policies that choose by search keys and places alone."""


def shape_of(model: Any, applied: Applied, eight_bits: bool) -> Shape:
    """What all segments of a model's digests have in common.

    Raises:
        UnsupportedModelError: some layers keep other states than pyramids.
    """
    config = model.config.get_text_config(decoder=True)
    if sorted(applied.layers) != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            "a digest keeps layers with full attention only, and this model has others too (sliding or linear)"
        )
    policy = applied.reading.policy
    if not isinstance(policy, SERVED) or isinstance(policy, Observing):
        raise UnsupportedModelError(
            f"method {applied.settings.method!r} keeps more than keys, values and summaries, which a digest does not "
            "hold; digest with method mgam, streaming-llm or dyadic"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in CODES:
        raise UnsupportedModelError(f"a digest holds {', '.join(CODES)}, and the model has {dtype}")
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    reach = _votes_before(applied.settings)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    bits = 8 if eight_bits else getattr(torch, dtype).itemsize * 8
    return Shape(
        config.num_hidden_layers,
        config.num_attention_heads,
        heads,
        dim,
        dtype,
        applied.settings.pyramid_levels,
        reach,
        bits,
    )


def _votes_before(settings: Settings) -> int:
    """Queries before a segment that vote for blocks after it; calls cut no block, so lookahead=block needs none."""
    return 2 * max(settings.block, settings.question_block) if settings.lookahead == "none" else 0


def check_model(manifest: Manifest, model: Any, tokenizer: Any, path: Path) -> None:
    """Refuses another model or tokenizer than made the digest.

    Raises:
        DigestError: it is another.
    """
    named = manifest.model["name"] or "another model"
    if str(model.dtype).removeprefix("torch.") != manifest.shape.dtype:
        raise DigestError(
            f"{path} was made in {manifest.shape.dtype}, the model is in {str(model.dtype).removeprefix('torch.')}; "
            f"load it with --dtype {manifest.shape.dtype}"
        )
    config, shape = model.config.get_text_config(decoder=True), manifest.shape
    if (shape.layers, shape.query_heads) != (config.num_hidden_layers, config.num_attention_heads):
        raise DigestError(
            f"{path} has {shape.layers} layers of {shape.query_heads} heads, the model {config.num_hidden_layers} of "
            f"{config.num_attention_heads}; load {named}, or digest again"
        )
    adapter = manifest.settings.adapter
    if fingerprint.of_model(model, adapter) != manifest.model["fingerprint"]:
        those = "" if adapter is None else f" and the adapters {adapter} as they were then"
        raise DigestError(
            f"{path} was made with {named}{those}, and other weights were given; load that model, or digest again"
        )
    if fingerprint.of_tokenizer(tokenizer) != manifest.tokenizer:
        raise DigestError(
            f"{path} was made with another tokenizer than was given; use that of {named}, or digest again"
        )

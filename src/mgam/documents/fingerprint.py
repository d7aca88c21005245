"""Fingerprints: whether a model and a tokenizer are those that made a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgam.integrations.transformers import low_rank

SAMPLE = 64
"""Numbers of each weight that are looked at, evenly spread: a fine-tuned model differs in nearly all."""


def of_model(model: Any, adapter: str | None = None) -> str:
    """A hash of shapes, number formats and a sample of all weights, and of the adapters that `adapter` names; the
    device does not matter."""
    found = hashlib.sha256()
    weights = sorted(model.named_parameters())
    samples = [_sample(weight.detach().reshape(-1)) for _, weight in weights]
    for (name, weight), sample in zip(weights, _on_cpu(samples), strict=True):
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        found.update(sample.numpy().tobytes())
    rotary = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    found.update(json.dumps(rotary, sort_keys=True, default=str).encode())
    if adapter is not None:
        found.update(low_rank.fingerprint(adapter).encode())
    return found.hexdigest()


def _sample(flat: Tensor) -> Tensor:
    """Bytes of a sample of numbers."""
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].contiguous().view(torch.uint8)


def _on_cpu(samples: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same on the CPU: from one device they are fetched at once."""
    if len({sample.device for sample in samples}) != 1:
        return [sample.cpu() for sample in samples]
    return torch.cat(list(samples)).cpu().split([len(sample) for sample in samples])


def of_tokenizer(tokenizer: Any) -> str:
    """A hash of what turns text into tokens, and of the chat template."""
    if getattr(tokenizer, "is_fast", False):
        whole = tokenizer.backend_tokenizer.to_str()
        # Before this part stand truncation and padding, which the last call set; parsing megabytes would take longer.
        table = whole[max(0, whole.find('"added_tokens":')) :]
    else:
        table = json.dumps(sorted(tokenizer.get_vocab().items()))
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True, default=str)
    return hashlib.sha256(f"{table}\n{template}".encode()).hexdigest()


def versions() -> dict[str, str]:
    """The libraries whose change may change the last bits of a digest."""
    import transformers

    import mgam

    return {"mgam": mgam.__version__, "torch": torch.__version__, "transformers": transformers.__version__}

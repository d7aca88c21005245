"""How many tokens a long text is read in at a time. The schedule decides what is read; this only decides how fast."""

from __future__ import annotations

from typing import Any

import torch

LEAST = 2048
"""Columns of a call wherever nothing says otherwise."""
MOST = 131072
"""Columns of a call on a GPU: each layer launches its kernels once a call, whatever the call holds, and for thin layers
that takes longer than they run."""
SHARE = 16
"""A call's activations take at most one part in so many of a GPU's memory."""


def call_size(model: Any, rows: int = 1) -> int:
    """Columns that `rows` rows of a long text are read in at once: a power of two from 2,048 to 131,072.

    It follows from the model and the device's whole memory, not from what is free: one machine always reads one text
    in the same calls. A model that mgam was not applied to takes small ones: its masks hold a number for each pair of
    a call's token and the text's.
    """
    device: torch.device = model.device
    if device.type != "cuda" or getattr(model, "_mgam_applied", None) is None:
        return LEAST
    total = torch.cuda.get_device_properties(device).total_memory
    fitting = int(total // SHARE // (max(1, rows) * activation_bytes(model)))
    return max(LEAST, min(MOST, 1 << (max(1, fitting).bit_length() - 1)))


def activation_bytes(model: Any) -> int:
    """Bytes that a layer's work on one token takes, about: residual, norms, projections and feed-forward network."""
    config = model.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return int(model.dtype.itemsize * (8 * hidden + 4 * inner))

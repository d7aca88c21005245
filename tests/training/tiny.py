"""A fit of some seconds: a llama of two layers over bytes, whose attention has a habit worth learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from documents.tiny import make_plain_model, make_tokenizer, text
from mgam.training.fit import Fitting, fit
from mgam.training.texts import Document

DIALS: dict[str, Any] = {
    "tokens": 512, "steps": 40, "batch": 2, "width": 6, "blocks": 4, "voters": 8, "window": 32, "block": 32,
    "levels": (1, 16, 64), "save_every": 10,
}  # fmt: skip
READING: dict[str, Any] = {
    "window": 32, "levels": (1, 16, 64), "block": 32, "question_block": 8, "dense_until": 0, "budget": 64,
}  # fmt: skip


def document(length: int = 20_000, seed: int = 0) -> Document:
    """A text of one token a byte."""
    return Document(f"text {seed}", torch.tensor(make_tokenizer()(text(length, seed))["input_ids"]))


def run(folder: str | Path, **dials: Any) -> Any:
    """Fits; what tests that kill a fit start in a process of its own."""
    torch.set_num_threads(1)
    return fit(make_plain_model(window=512), [document()], folder, Fitting(**{**DIALS, **dials}), say=lambda line: None)

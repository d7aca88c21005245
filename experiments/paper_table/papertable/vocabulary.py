"""One byte-level BPE for all models, trained on the train part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<pad>", "<end>", "<answer>", "<blank>", "<lead>", "<hop>", "<tale>")
PAD, END, ANSWER, BLANK = range(4)
TAGS = {"lead": 4, "hop": 5, "tale": 6, "far": 6}
"""Of a sample's first token; `far` is a tale whose question stands elsewhere."""
SIZE = 8192


def train_tokenizer(texts: Iterable[str], path: Path, size: int = SIZE) -> Tokenizer:
    """Trains and writes a tokenizer; special tokens are its first."""
    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(path))
    return made


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of many texts."""
    return [found.ids for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

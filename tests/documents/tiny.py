"""A llama of two layers over bytes, made in a moment and the same in every process; and texts for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgam.documents.document import Document
from mgam.documents.sources import Source
from mgam.integrations.transformers.apply import apply

TEMPLATE = (
    "{% for message in messages %}{{'<u>' if message['role'] == 'user' else '<a>'}}{{message['content']}}{{'<e>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
SPECIAL = ["<e>", "<u>", "<a>"]
GRID = {"call": 64, "segment": 128}
SETTINGS: dict[str, Any] = {
    "budget": 64, "window": 32, "levels": (1, 16, 64), "search": 4, "block": 32, "question_block": 8, "dense_until": 48,
}  # fmt: skip


def make_tokenizer(*, template: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", additional_special_tokens=SPECIAL[1:])
    fast.chat_template = TEMPLATE if template else None
    return fast


def make_plain_model(seed: int = 0, dtype: torch.dtype = torch.float32, window: int = 512) -> Any:
    """A model as it comes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=window, eos_token_id=0, pad_token_id=0, bos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.name_or_path = "tiny"
    return model


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model that mgam is applied to."""
    return apply(make_plain_model(seed, dtype), **{**SETTINGS, **settings})


def text(length: int, seed: int = 0) -> str:
    """Words of some sort."""
    choice = random.Random(seed)
    words = ["whale", "ship", "sea", "captain", "mast", "island", "storm", "sail", "harpoon", "north"]
    out = ""
    while len(out) < length:
        out += choice.choice(words) + choice.choice([" ", " ", " ", ".\n"])
    return out[:length]


def source(length: int, seed: int = 0) -> Source:
    """A text with a name; it does not end with white space, which would not be digested."""
    return Source(f"text {seed}", text(length - 1, seed) + ".")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a digest but the lock."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "writer.lock"}


def run(folder: str, length: int) -> None:
    """Digests a text of `length` bytes: what tests that kill a writer start."""
    torch.set_num_threads(1)
    Document.digest(make_model(), make_tokenizer(), [source(length)], folder, **GRID)

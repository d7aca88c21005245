"""Estimates of memory, refusals in time, and the peak that is reported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from mgam.errors import MemoryBudgetError
from mgam.integrations.memory import (
    available_bytes,
    estimate_reading,
    peak_memory_bytes,
    refuse_if_too_large,
    total_bytes,
)

CONFIG = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64)


def test_estimate_counts_keys_and_values_of_every_layer() -> None:
    need = estimate_reading(CONFIG, 1000, bytes_per_number=4)
    assert need.keys_values == 2 * 1000 * 30 * 3 * 64 * 4
    assert 0.1 * need.keys_values < need.pyramid < 0.5 * need.keys_values
    assert need.total == need.keys_values + need.pyramid + need.working


def test_estimate_without_grouped_heads_or_head_width() -> None:
    config = SimpleNamespace(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    assert estimate_reading(config, 10, bytes_per_number=2).keys_values == 2 * 10 * 2 * 64 * 2


def test_refusal_says_what_is_needed_and_what_fits() -> None:
    model = SimpleNamespace(config=CONFIG, device=torch.device("cpu"), dtype=torch.float32)
    assert refuse_if_too_large(model, 1000, free_bytes=2**40).total > 0
    with pytest.raises(MemoryBudgetError) as caught:
        refuse_if_too_large(model, 1_000_000, free_bytes=8 * 2**30)
    message = str(caught.value)
    assert "1,000,000 tokens" in message
    assert "8.0 GiB are free" in message
    assert "bfloat16" in message
    fitting = int(message.split("at most about ")[1].split(" ")[0].replace(",", ""))
    refuse_if_too_large(model, fitting, free_bytes=8 * 2**30)
    with pytest.raises(MemoryBudgetError):
        refuse_if_too_large(model, fitting + 2000, free_bytes=8 * 2**30)


def test_refusal_where_nothing_fits() -> None:
    model = SimpleNamespace(config=CONFIG, device=torch.device("cpu"), dtype=torch.bfloat16)
    with pytest.raises(MemoryBudgetError, match="free some memory"):
        refuse_if_too_large(model, 1000, free_bytes=1000)


def test_what_the_machine_says() -> None:
    free, total = available_bytes(torch.device("cpu")), total_bytes()
    assert free is not None
    assert total is not None
    assert 0 < free <= total


def test_peak_grows_with_use() -> None:
    before = peak_memory_bytes()
    assert before > 10 * 2**20
    block = torch.ones(before // 4 + 16 * 2**20)  # more than the peak so far, in float32
    after = peak_memory_bytes()
    assert after > before
    assert after >= block.numel() * 4

"""How many tokens are read at a time: by the machine and the model, and of no weight for what comes out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mgam.integrations.transformers import call_size as sizes
from mgam.integrations.transformers.call_size import call_size

from .zoo import BY_NAME


class _Somewhere:
    """A model's shape on a device that need not be there."""

    dtype = torch.bfloat16

    def __init__(self, device: str, hidden: int, inner: int, applied: bool = True) -> None:
        self._mgam_applied = applied or None
        self.device = torch.device(device)
        text = SimpleNamespace(hidden_size=hidden, intermediate_size=inner)
        self.config = SimpleNamespace(get_text_config=lambda decoder: text)


def test_calls_grow_with_the_gpu_and_shrink_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    small, large = _Somewhere("cuda", 576, 1536), _Somewhere("cuda", 4096, 14336)
    assert call_size(BY_NAME["llama"].make()) == sizes.LEAST
    assert [call_size(small, rows) for rows in (1, 8, 64)] == [131072, 16384, 2048]
    assert [call_size(large, rows) for rows in (1, 2, 16)] == [16384, 8192, 2048]
    assert call_size(_Somewhere("cuda", 576, 1536, applied=False)) == sizes.LEAST
    memory.total_memory = 2**30
    assert call_size(large) == sizes.LEAST

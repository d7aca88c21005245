"""What is loaded before it is needed, beside something else."""

from __future__ import annotations

import sys

import pytest
import torch

from mgam.integrations import warming
from mgam.threads import quick_turns

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_beforehand_can_be_called(dtype: torch.dtype) -> None:
    assert warming.load_libraries(CPU, dtype).isfinite()
    with warming.beside(CPU, dtype):
        pass
    warming.finish(CPU, dtype)


def test_turns_are_quick_within_and_as_before_afterwards() -> None:
    usual = sys.getswitchinterval()
    with quick_turns():
        assert sys.getswitchinterval() < usual
        with pytest.raises(KeyError), quick_turns():
            raise KeyError
        assert sys.getswitchinterval() < usual
    assert sys.getswitchinterval() == usual


def test_triton_is_told_its_key_beforehand() -> None:
    pytest.importorskip("triton")
    from triton.runtime.cache import triton_key

    assert warming.load_triton() == triton_key()
    assert triton_key.cache_info().currsize == 1

"""Cross attention: a partition of the source, equal to full attention where everything is opened, padded rows alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mgam import nn
from mgam.errors import SettingError

KINDS: dict[str, Callable[[], nn.CrossAttention]] = {
    "full": lambda: nn.FullCrossAttention(16, 4, 2),
    "performer": lambda: nn.PerformerCrossAttention(16, 4, 2),
    "granular": lambda: nn.MultiGranularCrossAttention(16, 4, 2, chunk=4, budget=8),
}


def made(name: str) -> nn.CrossAttention:
    torch.manual_seed(0)
    return KINDS[name]().double()


def states(tokens: int, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_everything_opened_is_full_attention() -> None:
    full, granular = made("full"), nn.MultiGranularCrossAttention(16, 4, 2, chunk=4, budget=64).double()
    granular.load_state_dict(full.state_dict())
    for length in (1, 3, 4, 29, 64):
        found = granular(states(7), states(length, seed=2))
        torch.testing.assert_close(found, full(states(7), states(length, seed=2)), atol=1e-9, rtol=0)


def test_equal_keys_in_chunks_are_full_attention() -> None:
    full, granular = made("full"), made("granular")
    granular.load_state_dict(full.state_dict())
    source = states(8, seed=2).repeat_interleave(4, 1)
    torch.testing.assert_close(granular(states(7), source), full(states(7), source), atol=1e-9, rtol=0)
    source = torch.cat((source, states(3, seed=3)), 1)
    torch.testing.assert_close(granular(states(7), source), full(states(7), source), atol=1e-9, rtol=0)


def test_what_a_query_searches_for_is_opened() -> None:
    granular = made("granular")
    q, k = torch.randn(1, 4, 5, 4).double(), torch.randn(1, 2, 40, 4).double()
    k[:, :, 22] = 50 * q[:, ::2, 3]
    v = torch.randn(1, 2, 40, 4).double()
    out = granular.attend(q, k, v)
    torch.testing.assert_close(out[:, ::2, 3], v[:, :, 22], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_odd_sizes_padding_and_gradients(name: str) -> None:
    module = made(name)
    for target, source in ((0, 5), (3, 0), (1, 1), (5, 3), (4, 17)):
        assert module(states(target), states(source, seed=2)).shape == (2, target, 16)
    source, mask = states(17, seed=2), torch.ones(2, 17, dtype=torch.bool)
    mask[0, 11:] = False
    source[~mask] = torch.nan
    out = module(states(4), source, mask)
    torch.testing.assert_close(out[:1], module(states(4)[:1], source[:1, :11]), atol=1e-12, rtol=0)
    inputs = (states(3, 1).requires_grad_(), states(9, 1, 2).requires_grad_())
    assert torch.autograd.gradcheck(module, inputs, atol=1e-5, fast_mode=True)
    mask[1, 4] = False
    with pytest.raises(SettingError, match="has holes"):
        module(states(4), source, mask)
    with pytest.raises(SettingError, match=r"a mask of shape \(2, 16\) was given"):
        module(states(4), source, mask[:, :16])
    with pytest.raises(SettingError, match="1 rows of source were given for 2 rows of target"):
        module(states(4), source[:1])
    with pytest.raises(SettingError, match=r"hidden states \(rows, tokens, \d+\) are wanted"):
        module(states(4), source[..., :-1])


def test_settings_name_their_range() -> None:
    with pytest.raises(SettingError, match="search=3 must divide chunk=4"):
        nn.MultiGranularCrossAttention(16, 4, chunk=4, search=3)
    with pytest.raises(SettingError, match=r"budget=2 must be one chunk \(4\)"):
        nn.MultiGranularCrossAttention(16, 4, chunk=4, budget=2)
    with pytest.raises(SettingError, match="kv_heads=3 must divide"):
        nn.FullCrossAttention(16, 4, 3)

"""The merge operator: parts of a softmax joined give the softmax of the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mgam.merge import Part, merge


def part(logits: torch.Tensor, values: torch.Tensor) -> Part:
    """Attention of queries with these logits (..., E) over values (..., E, D)."""
    lse = torch.logsumexp(logits, -1)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    return Part((weights[..., None, :] @ values)[..., 0, :], lse)


@pytest.mark.parametrize("borders", [[7], [1, 2, 12], [0, 5], [13]])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_parts_give_the_whole(borders: list[int], shift: float) -> None:
    rng = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(2, 5, 13, generator=rng, dtype=torch.float64) + shift
    values = torch.randn(2, 5, 13, 4, generator=rng, dtype=torch.float64)
    edges = [0, *borders, 13]
    parts = [part(logits[..., a:b], values[..., a:b, :]) for a, b in pairwise(edges)]
    joined, whole = merge(parts), part(logits, values)
    torch.testing.assert_close(joined.out, whole.out)
    torch.testing.assert_close(joined.lse, whole.lse)
    torch.testing.assert_close(merge([merge(parts[:1]), merge(parts[1:])]).out, whole.out)


def test_nothing_read_gives_zeros() -> None:
    """Not even NaN in a part that holds nothing comes through."""
    nothing = Part(torch.full((3, 4), torch.nan), torch.full((3,), -torch.inf))
    joined = merge([nothing, nothing])
    assert torch.equal(joined.out, torch.zeros(3, 4))
    assert torch.isneginf(joined.lse).all()
    something = Part(torch.ones(3, 4), torch.tensor([0.0, -1e30, 90.0]))
    joined = merge([nothing, something])
    assert torch.equal(joined.out, something.out)
    torch.testing.assert_close(joined.lse, something.lse)


def test_rough_parts_are_joined_in_single_precision() -> None:
    rng = torch.Generator().manual_seed(4)
    logits, values = 4 * torch.randn(6, 40, generator=rng), torch.randn(6, 40, 4, generator=rng)
    parts = [part(logits[:, a : a + 8], values[:, a : a + 8]) for a in range(0, 40, 8)]
    rough = merge([Part(one.out.bfloat16(), one.lse) for one in parts])
    assert rough.out.dtype == torch.bfloat16
    assert rough.lse.dtype == torch.float32
    torch.testing.assert_close(rough.out.float(), part(logits, values).out, atol=2e-2, rtol=2e-2)


def test_gradients_pass() -> None:
    rng = torch.Generator().manual_seed(5)
    outs = [torch.randn(3, 2, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    sums = [torch.randn(3, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def joined(*leaves: torch.Tensor) -> torch.Tensor:
        return merge([Part(leaves[0], leaves[2]), Part(leaves[1], leaves[3])]).out

    assert torch.autograd.gradcheck(joined, (*outs, *sums))

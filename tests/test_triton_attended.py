"""Attention that keys get from many queries: the kernel against weights that are written out in float64."""

from __future__ import annotations

import pytest
import torch

from mgam.policies.eviction import masses as written
from mgam.positions import Positions
from triton_cases import DEVICE, DTYPES, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize(("first", "count", "places"), [(0, 130, 130), (70, 33, 103), (99, 1, 100), (3, 20, 11)])
def test_masses(first: int, count: int, places: int) -> None:
    from mgam.policies.attended_triton import masses

    rng = torch.Generator().manual_seed(first)
    for dtype in DTYPES:
        queries, keys = torch.randn(2, 6, count, 64, generator=rng), torch.randn(2, 2, places, 64, generator=rng)
        queries, keys = queries.to(DEVICE, dtype), keys.to(DEVICE, dtype)
        got = masses(queries, first, keys, 0.2).cpu().double()
        want = written(queries.double(), first, keys.double(), 0.2, Positions()).cpu()
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(got.sum(), torch.tensor(6.0 * 2 * count).double(), rtol=1e-4, atol=0)


def test_a_query_that_is_no_number_counts_nothing() -> None:
    from mgam.policies.attended_triton import masses

    rng = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1, 2, 20, 64, generator=rng), torch.randn(1, 1, 20, 64, generator=rng)
    queries[0, 0, 7] = torch.nan
    got = masses(queries.to(DEVICE, DTYPES[0]), 0, keys.to(DEVICE, DTYPES[0]), 0.2).cpu().double()
    assert got.isfinite().all()
    torch.testing.assert_close(got.sum(), torch.tensor(39.0).double(), rtol=1e-3, atol=0)

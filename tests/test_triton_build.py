"""The build kernel against the plain means."""

from __future__ import annotations

import pytest
import torch

from mgam import kernels
from mgam.levels import Levels
from mgam.pyramid import Pyramid
from triton_cases import DEVICE, DTYPES, needs_triton, poisoned

pytestmark = needs_triton


@pytest.mark.parametrize(("sizes", "search", "dim"), [((1, 8, 32), 4, 64), ((1, 24), 3, 96), ((1, 64, 128), 4, 128)])
def test_equals_means(sizes: tuple[int, ...], search: int, dim: int) -> None:
    from mgam.pyramid_triton import build

    levels = Levels(sizes, search)
    chunks = 3
    for dtype in DTYPES:
        states = torch.randn(2, 2, 2, chunks * levels.chunk, dim, device=DEVICE).to(dtype)
        keys, values = poisoned(states[0], 5), poisoned(states[1].transpose(1, 2).contiguous().transpose(1, 2), 2)
        wide = Pyramid.of(keys.double(), values.double(), levels)
        assert wide.search is not None
        made = [torch.full_like(level, torch.nan, dtype=dtype) for level in (wide.keys[1], wide.values[1])]
        found = torch.full_like(wide.search, torch.nan, dtype=dtype)
        kept = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)
        build(keys, values, *made, found, levels, kept)
        assert torch.equal(kept[0], keys)
        assert torch.equal(kept[1], values)
        again = torch.full_like(found, torch.nan)
        build(keys, values, *made, again, levels)
        assert torch.equal(again, found)
        loose = 1e-5 if dtype == torch.float32 else 1e-2
        for got, want in zip((*made, found), (wide.keys[1], wide.values[1], wide.search), strict=True):
            assert torch.allclose(got.double(), want, atol=loose, rtol=loose)


@pytest.mark.skipif(DEVICE == "cpu", reason="appending builds with the kernel on a CUDA device only")
def test_append_in_any_cut() -> None:
    levels = Levels((1, 8, 32), 4)
    states = torch.randn(2, 2, 203, 64, device=DEVICE, dtype=torch.bfloat16)
    whole, parts = Pyramid(levels), Pyramid(levels)
    whole.append(states, states)
    for cut in states.split([1, 50, 2, 150], 2):
        parts.append(cut, cut)
    assert whole.search is not None
    assert parts.search is not None
    for level, size in enumerate(levels.sizes):
        count = 203 // size
        assert torch.equal(whole.keys[level][:, :, :count], parts.keys[level][:, :, :count])
        assert torch.equal(whole.values[level][:, :, :count], parts.values[level][:, :, :count])
    assert torch.equal(whole.search[:, :, :, :25], parts.search[:, :, :, :25])
    plain = Pyramid.of(states.double(), states.double(), levels)
    assert torch.allclose(whole.keys[1][:, :, :25].double(), plain.keys[1][:, :, :25], atol=2e-2)


@pytest.mark.parametrize("cuts", [[203], [64, 139], [1, 50, 2, 150]])
def test_what_is_appended_is_kept(cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole chunks are copied as they are summarised, what is left of a call is copied by itself."""
    levels = Levels((1, 8, 32), 4)
    monkeypatch.setattr(kernels, "serve", lambda states: True)
    states = torch.randn(2, 2, 2, 203, 64, device=DEVICE).to(DTYPES[-1])
    pyramid, want = Pyramid(levels), Pyramid.of(states[0].double(), states[1].double(), levels)
    for keys, values in zip(states[0].split(cuts, 2), states[1].split(cuts, 2), strict=True):
        pyramid.append(keys, values.transpose(1, 2).contiguous().transpose(1, 2))
    assert pyramid.search is not None
    assert want.search is not None
    loose = 1e-5 if states.dtype == torch.float32 else 2e-2
    for level, size in enumerate(levels.sizes):
        count = 203 // size
        for got, expected in ((pyramid.keys, want.keys), (pyramid.values, want.values)):
            assert torch.allclose(got[level][:, :, :count].double(), expected[level][:, :, :count], atol=loose)
    assert torch.equal(pyramid.keys[0][:, :, :203], states[0])
    assert torch.equal(pyramid.values[0][:, :, :203], states[1])
    assert torch.allclose(pyramid.search[:, :, :, :25].double(), want.search[:, :, :, :25], atol=2e-2)


@pytest.mark.parametrize("pulled", ["all", "some", "tokens"])
@pytest.mark.parametrize("tokens", [203, 5])
def test_gradients_of_levels_come_back_to_tokens(tokens: int, pulled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do through plain means, whichever levels were read."""
    levels = Levels((1, 8, 32), 4)
    states = torch.randn(2, 2, tokens, 2, 48, device=DEVICE).to(DTYPES[-1])
    found = {}
    for served, dtype in ((False, torch.float64), (True, DTYPES[-1])):
        monkeypatch.setattr(kernels, "serve", lambda states, served=served: served)
        leaves = [one.to(dtype).requires_grad_() for one in states]
        pyramid = Pyramid.of(*(leaf.transpose(1, 2) for leaf in leaves), levels)
        made = list(zip(pyramid.keys, pyramid.values, strict=True))
        read = {"all": sum(made, ()), "some": (made[0][0], *made[1]), "tokens": made[0]}[pulled]
        torch.manual_seed(1)
        total = sum((level * torch.randn(level.shape, device=DEVICE)).sum() for level in read)
        assert isinstance(total, torch.Tensor)
        total.backward()
        found[served] = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        assert pyramid.search is not None
        assert not pyramid.search.requires_grad
    for got, want in zip(found[True], found[False], strict=True):
        assert torch.allclose(got.double(), want, atol=1e-5 if got.dtype == torch.float32 else 2e-2)

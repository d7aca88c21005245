"""Weights on other devices, by code path: what mgam keeps lies where a layer's keys are, and MPS gets no float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mgam
from mgam import PyramidCache
from mgam.attend.dispatch import choose

from .elsewhere import Placed, devices, put, where
from .features import batch, texts
from .zoo import BY_NAME, SMALL, Tiny, tokens

UNLIKE = ["llama", "phi3", "gemma2", "gemma3"]
"""Models whose attention is unlike each other's."""


def read(model: Any, device: str) -> list[Tensor]:
    """Logits of everything that a model does with a text: padded, in calls with a cache, step by step, cropped."""
    padded, mask = (part.to(device) for part in batch(texts(), "left"))
    found = [model(padded, attention_mask=mask, use_cache=False).logits * mask[..., None]]
    cache, ids = PyramidCache(model), tokens(2, 61).to(device)
    for first, last in ((0, 40), (40, 58), (58, 59), (59, 60), (60, 61)):
        found.append(model(ids[:, first:last], past_key_values=cache).logits)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    found.append(model(ids[:, 58:].flip(0), past_key_values=cache).logits)
    return [one.here if isinstance(one, Placed) else one for one in found]


@pytest.mark.parametrize("positions", ["absolute", "granular"])
@pytest.mark.parametrize("name", UNLIKE)
def test_another_device(name: str, positions: Any) -> None:
    """Apple's MPS and any other device that torch knows: the torch backend, with the numbers of the CPU."""
    tiny = BY_NAME[name]
    with torch.no_grad():
        model = mgam.apply(tiny.make(torch.float32), budget=12, positions=positions, **SMALL)
        expected = read(model, "cpu")
        with devices():
            model = tiny.make(torch.float32)
            put(model, "mps:0")
            found = read(mgam.apply(model, budget=12, positions=positions, **SMALL), "mps:0")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def spread(tiny: Tiny) -> Any:
    """A model whose layers lie on two devices in turn, with hooks that bring states along, as accelerate's do."""
    model = tiny.make(torch.float32)
    put(model, "mps:0")
    for number, layer in enumerate(model.model.layers):
        place = f"mps:{number % 2}"
        for part in layer.modules():
            for kept in (part._parameters, part._buffers):
                kept.update(
                    {name: Placed(one.here, torch.device(place)) for name, one in kept.items() if one is not None}
                )
        layer.register_forward_pre_hook(bring(place), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(bring("mps:0"), with_kwargs=True)
    return model


def bring(place: str) -> Any:
    def moved(one: Any) -> Any:
        if isinstance(one, tuple):
            return tuple(map(moved, one))
        return one.to(place) if isinstance(one, Tensor) else one

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return moved(args), {name: moved(one) for name, one in kwargs.items()}

    return hook


@pytest.mark.parametrize("name", UNLIKE)
def test_layers_on_two_devices(name: str) -> None:
    tiny = BY_NAME[name]
    with torch.no_grad():
        expected = read(mgam.apply(tiny.make(torch.float32), budget=12, **SMALL), "cpu")
        with devices():
            model = mgam.apply(spread(tiny), budget=12, **SMALL)
            found = read(model, "mps:0")
            cache = PyramidCache(model)
            model(tokens(1, 40).to("mps:0"), past_key_values=cache)
            for number, layer in cache.pyramids.items():
                assert {where(states) for states in layer.pyramid.keys} == {torch.device(f"mps:{number % 2}")}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_dispatcher_takes_torch_there() -> None:
    with devices():
        choice = choose(Placed(torch.zeros(1, 4, 8, 16), torch.device("mps:0")))
    assert choice.backend == "torch"
    assert "triton" in choice.reason


def test_tokens_on_another_device_are_no_silent_mixture() -> None:
    with devices(), torch.no_grad():
        model = BY_NAME["llama"].make(torch.float32)
        put(model, "mps:1")
        mgam.apply(model, budget=12, **SMALL)
        with pytest.raises(RuntimeError, match="operands lie on"):
            model(tokens(1, 9).to("mps:0"))


def test_what_is_refused_elsewhere_is_refused_here() -> None:
    """Else these tests could not fail."""
    with devices():
        one, other = (Placed(torch.ones(3), torch.device(name)) for name in ("mps:0", "mps:1"))
        with pytest.raises(RuntimeError, match="operands lie on"):
            one + other
        with pytest.raises(RuntimeError, match="operands lie on"):
            one + torch.ones(3)
        with pytest.raises(TypeError, match=r"MPS has no torch\.float64"):
            one.double()
        assert (one.to("mps:1") + other).tolist() == [2.0, 2.0, 2.0]

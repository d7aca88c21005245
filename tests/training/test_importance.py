"""Which heads matter to the next token: one that says nothing does not, and a mark asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from documents.tiny import make_plain_model
from mgam.levels import Levels
from mgam.training.importance import measure_importance
from mgam.training.lessons import Sampling
from mgam.training.network import SearchNetwork
from mgam.training.teacher import Narrow, _narrowed, watching

from .tiny import document

SAMPLING = Sampling(Levels((1, 16, 64), 4), window=32, block=32)


def network_for(model: Any) -> SearchNetwork:
    config = model.config
    heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    dim = config.hidden_size // config.num_attention_heads
    return SearchNetwork(dict.fromkeys(range(config.num_hidden_layers), (heads, group, dim)), 6, 2, 6)


def test_a_head_that_says_nothing_does_not_matter() -> None:
    """Its values are nothing, so that it may read what it likes; the others have a mean of one among all."""
    model = make_plain_model(window=512)
    network = network_for(model)
    mute = model.model.layers[1].self_attn.v_proj.weight
    dim = network.layer(1).dim
    with torch.no_grad():
        mute[:dim] = 0
    told = measure_importance(model, network, [document().ids[:512]] * 2, SAMPLING, lambda line: None)
    assert told["texts"] == 2
    found = torch.cat([network.layer(layer).importance for layer in range(len(network.layers))])
    assert network.layer(1).importance[0] < 1e-3
    assert (found > 1e-3).sum() == len(found) - 1
    assert float(found.mean()) == pytest.approx(1.0, rel=1e-5)
    for layer in told["layers"].values():
        assert all(0 < share < 1 for share in layer["lost"])


def test_without_texts_all_heads_matter_alike() -> None:
    network = network_for(make_plain_model(window=512))
    assert measure_importance(None, network, [], SAMPLING, lambda line: None) == {}
    assert all(bool((network.layer(layer).importance == 1).all()) for layer in range(len(network.layers)))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tokens", [5, 300, 512])
def test_a_narrowed_head_reads_sink_and_window(tokens: int, softcap: float | None) -> None:
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 8, generator=rng) for heads in (2, 1, 1))
    place = torch.arange(tokens)
    seen = (place <= place[:, None]) & ((place > place[:, None] - 40) | (place < 16))
    logits = query @ key.transpose(2, 3) * 0.3
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1) @ value
    got = _narrowed(query, key, value, 0.3, softcap, Narrow(0, 0, sink=16, window=40))
    torch.testing.assert_close(got, wanted)


def test_one_head_alone_is_narrowed() -> None:
    """With a window as long as the text nothing changes; with a short one the next tokens do, and only then."""
    model = make_plain_model(window=512)
    ids = document().ids[None, :256]
    with torch.no_grad():
        whole = model(ids).logits
        for window, alike in ((256, True), (32, False)):
            with watching(model, lambda seen: None, Narrow(1, 0, sink=16, window=window)):
                less = model(ids).logits
            assert torch.allclose(less, whole, atol=1e-5) is alike
            torch.testing.assert_close(less[:, :32], whole[:, :32], atol=1e-5, rtol=1e-5)


def test_rounding_does_not_make_a_head_matter() -> None:
    """What a faint head is worth is the same in half precision, whose rounding says more of the next token than it."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_plain_model(window=512)
        network = network_for(model)
        dim = network.layer(0).dim
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight[dim : 2 * dim] *= 0.003
        told = measure_importance(model.to(dtype), network, [document().ids[:512]] * 2, SAMPLING, lambda line: None)
        found.append(float(network.layer(0).importance[1]))
    assert found[1] == pytest.approx(found[0], rel=0.5)
    layer = told["layers"]["0"]
    assert layer["divergence"][1] < 2 * layer["rounding"][0], "of which most is rounding"

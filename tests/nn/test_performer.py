"""Performer: what its features say of large keys, without looking ahead, and how near it comes to softmax."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mgam import nn
from mgam.nn import performer
from mgam.nn.performer import orthogonal


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def large(causal: bool = True) -> nn.PerformerAttention:
    """Heads of 64 dimensions whose keys and queries are some 75 long; norms differ from token to token."""
    torch.manual_seed(0)
    module = nn.PerformerAttention(128, 2, 1, causal=causal, rotary=False)
    with torch.no_grad():
        module.key.weight.mul_(20)
        module.query.weight.mul_(20)
    return module


def texts(tokens: int = 150) -> Tensor:
    return drawn(2, tokens, 128) * drawn(2, tokens, 1, seed=1).abs()


def by_pairs(module: nn.PerformerAttention, states: Tensor) -> Tensor:
    """The same by logarithms of all pairs, in float64."""
    module, states = copy.deepcopy(module).double(), states.double()
    q, k, v = (module.split(part(states)) for part in (module.query, module.key, module.value))
    asking, told = (part * module.scale**0.5 @ module.features.T for part in (q, k))
    told = told - k.square().sum(-1, keepdim=True) * module.scale / 2
    logs = torch.logsumexp(asking[:, :, :, None] + told[:, :, None], -1)
    if module.causal:
        logs = logs.masked_fill(torch.ones_like(logs, dtype=torch.bool).triu(1), -torch.inf)
    return module.out((logs.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
def test_large_keys_are_read_and_learned(causal: bool) -> None:
    module, states = large(causal), texts()
    norms = module.split(module.key(states)).norm(dim=-1)
    assert norms.mean() > 70
    assert norms.min() < 6
    out = module(states)
    torch.testing.assert_close(out.double(), by_pairs(module, states), atol=1e-5, rtol=1e-4)
    assert out.abs().mean() > 1e-3
    out.square().sum().backward()
    for part in (module.query, module.key, module.value):
        grad = part.weight.grad
        assert grad is not None
        assert torch.isfinite(grad).all()
        assert grad.abs().mean() > 1e-5


def test_later_keys_however_small_leave_earlier_outputs() -> None:
    """Features of a small key are e^300 times those of a large one: a maximum that looked ahead would erase these."""
    module, states = large(), texts()
    states[:, 0] *= 40
    out = module(states)
    for place in (1, 2, 37, 64, 100):
        for size in (0.0, 1e-3, 20.0):
            changed = states.clone()
            changed[:, place:] *= size
            torch.testing.assert_close(module(changed)[:, :place], out[:, :place], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[1] * 150, [64, 1, 63, 22], [3, 130, 17]], ids=["by token", "by chunk", "by part"])
def test_large_keys_are_streamed(cuts: list[int]) -> None:
    module, states = large(), texts()
    outs, state = [], None
    for part in states.split(cuts, 1):
        out, state = module.step(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), module(states), atol=1e-5, rtol=1e-4)


def test_long_texts_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module, states = large(), texts()
    whole = module(states)
    monkeypatch.setattr(performer, "TOGETHER", 70)
    torch.testing.assert_close(module(states), whole, atol=1e-5, rtol=1e-4)
    out, state = module.step(states[:, :0])
    assert out.shape == (2, 0, 128)
    torch.testing.assert_close(module.step(states, state)[0], whole, atol=1e-5, rtol=1e-4)


def test_sums_are_wide_under_autocast() -> None:
    module, states = large(), texts(70)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = module.step(states)
    assert {part.dtype for part in state.kept.values()} == {torch.float32}


@pytest.mark.parametrize("causal", [True, False])
def test_many_features_come_near_softmax(causal: bool) -> None:
    torch.manual_seed(0)
    full, states = nn.FullAttention(16, 2, causal=causal).double(), 0.5 * drawn(1, 33, 16).double()
    errors = []
    for rank in (64, 1024, 16384):
        module = nn.PerformerAttention(16, 2, causal=causal, rank=rank).double()
        module.load_state_dict(full.state_dict() | {"features": module.features})
        with torch.no_grad():
            errors.append(float((module(states) - full(states)).norm() / full(states).norm()))
    assert errors[2] < 0.01
    assert errors[2] < errors[1] / 2 < errors[0] / 4


def test_products_of_features_are_the_exponential() -> None:
    """In the mean; and directions that are orthogonal in blocks scatter less than independent ones."""
    q, k = 0.3 * drawn(1, 1, 1, 8), 0.3 * drawn(1, 1, 1, 8, seed=1)
    wanted = float(torch.exp((q * k).sum() * 8**-0.5))
    scatter: dict[str, float] = {}
    for name in ("orthogonal", "independent"):
        found = []
        for seed in range(400):
            directions = orthogonal(8, 8, seed) if name == "orthogonal" else drawn(8, 8, seed=seed)
            asking, told, _ = performer.prepared(q, k, k, directions, 8**-0.5)
            found.append(torch.exp(asking[:, :, 0] + told - q.square().sum() * 8**-0.5 / 2).mean())
        scatter[name] = float(torch.stack(found).std())
        assert abs(float(torch.stack(found).mean()) - wanted) < 4 * scatter[name] / 400**0.5
    assert scatter["orthogonal"] < scatter["independent"]

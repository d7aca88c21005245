"""Published methods where a simple oracle says what they are: limits at which they are full attention, and plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgam import nn
from mgam.nn.nsa import _overlaps

WIDTH, HEADS = 16, 2


def text(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def full(module: nn.SelfAttention, states: Tensor) -> Tensor:
    """Full attention with the projections of a module."""
    torch.manual_seed(0)
    made = nn.FullAttention(WIDTH, HEADS, module.kv_heads, causal=module.causal).double()
    made.load_state_dict({name: part for name, part in module.state_dict().items() if name in made.state_dict()})
    return made(states)


def test_linformer_with_a_row_for_each_position_is_full_attention() -> None:
    module = nn.LinformerAttention(WIDTH, HEADS, 1, causal=False, rank=21, longest=21).double()
    for rows in (module.rows_of_keys, module.rows_of_values):
        torch.nn.init.eye_(rows)
    torch.testing.assert_close(module(text(21)), full(module, text(21)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_reformer_of_two_chunks_is_full_attention_with_shared_queries_and_keys(
    causal: bool, rounds: int, kv_heads: int
) -> None:
    module = nn.ReformerAttention(WIDTH, HEADS, kv_heads, causal=causal, bucket=12, rounds=rounds).double()
    states = text(24)
    q = module.turned(module.split(module.query(states)), 0)
    logits = module.scale * q @ torch.nn.functional.normalize(q, dim=-1).transpose(-1, -2)
    logits = logits.masked_fill(torch.eye(24, dtype=torch.bool), -5e4)
    if causal:
        logits = logits.masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1), -torch.inf)
    wanted = logits.softmax(-1) @ module.split(module.value(states)).repeat_interleave(HEADS // kv_heads, 1)
    torch.testing.assert_close(module(states), module.out(wanted.transpose(1, 2).flatten(2)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("rotated", [False, True])
def test_equal_tokens_meet_wherever_they_stand(rotated: bool) -> None:
    """Reformer hashes what is not rotated yet, unless it is to."""
    module = nn.ReformerAttention(WIDTH, HEADS, bucket=8, hash_rotated=rotated).double()
    states = text(256)
    states[:, 3::9] = states[:, 3:4].clone()
    found: list[Tensor] = []
    hashed = module.hashed
    module.hashed = lambda q, turns: found.append(hashed(q, turns)) or found[-1]  # type: ignore[method-assign,func-returns-value]
    whole = module(states)
    for buckets in found:
        assert bool((buckets[:, :, 3::9] == buckets[:, :, 3:4]).all()) is not rotated
        assert len(buckets.unique()) > 8
    streamed = module.step(states[:, 200:], module.step(states[:, :200])[1])[0]
    torch.testing.assert_close(streamed, whole[:, 200:], atol=1e-9, rtol=0)


def test_the_same_seed_is_the_same_draw() -> None:
    for kind, name in ((nn.ReformerAttention, "turns"), (nn.PerformerAttention, "features")):
        made = [getattr(kind(WIDTH, HEADS, seed=seed), name) for seed in (3, 3, 4)]
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("causal", [True, False])
def test_plans_of_bigbird(causal: bool) -> None:
    def plan(seed: int, first: int = 0) -> Tensor:
        return nn.BigBirdAttention(WIDTH, HEADS, causal=causal, block=4, random=3, seed=seed).plan(first, 30, 30)

    assert torch.equal(plan(7), plan(7))
    assert not torch.equal(plan(7), plan(8))
    assert torch.equal(plan(7)[11:], plan(7, 11))
    for number, row in enumerate(plan(7).tolist()):
        there = [one for one in row if one >= 0]
        near = {0, number - 1, number} | (set() if causal else {number + 1, 29})
        wanted = {one for one in near if 0 <= one < 30}
        assert len(there) == len(set(there))
        assert wanted <= set(there)
        assert max(there) <= (number if causal else 29)
        among = number + 1 if causal else 30
        assert len(there) == min(len(wanted) + 3, among)


def test_nsa_that_reads_all_selected_blocks_is_full_attention() -> None:
    module = nn.NativeSparseAttention(WIDTH, HEADS, 1, length=4, stride=2, select=4, blocks=9, window=5).double()
    with torch.no_grad():
        module.gates.bias.copy_(torch.tensor([-1e3, 1e3, -1e3]).repeat(HEADS))
    torch.testing.assert_close(module(text(33)), full(module, text(33)), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("select", "length", "stride"), [(64, 32, 16), (8, 4, 2), (8, 8, 2), (4, 4, 4)])
def test_compressed_blocks_count_as_they_overlap(select: int, length: int, stride: int) -> None:
    """By strides that a compressed block shares with a selection block."""
    found = {shift: times for times, shift in _overlaps(select // stride, length // stride)}
    wanted = {}
    for shift in range(-length, select):
        shared = min(select, shift * stride + length) - max(0, shift * stride)
        if shared > 0:
            wanted[shift] = shared // stride
    assert found == wanted
    if (select, length, stride) == (64, 32, 16):
        assert list(found.values()) == [1, 2, 2, 2, 1]

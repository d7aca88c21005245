"""What policies that rank chunks by one published judgement must keep besides the battery."""

from __future__ import annotations

import pytest
import torch

from mgam import methods
from mgam.engine import Reading, read
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies import Voters
from mgam.policies.ranked import Boxes, ByBound, ByMean
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Schedule

LEVELS = Levels((1, 4), 4)


def states(tokens: int, rows: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(rows, 4, tokens, 8), (rows, 2, tokens, 8), (rows, 2, tokens, 8)]
    return tuple(torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)


def blocks_at(decide: list[int]) -> Blocks:
    """Blocks of one query that decide for themselves."""
    own = torch.tensor(decide)
    one = torch.ones_like(own)
    return Blocks(torch.zeros_like(own), own, one, own, own, own + 1, 1, 1)


def test_no_logit_exceeds_the_bound() -> None:
    queries, keys, values = states(40)
    pyramid = Pyramid.of(keys, values, LEVELS)
    blocks = blocks_at([39])
    voters = Voters(queries[:, :, 39:], torch.ones(1, 1, dtype=torch.bool))
    bound = ByBound().judge(voters, blocks, pyramid, LEVELS, 10)[0, :, :, 0]
    grouped = queries[0, :, 39].unflatten(0, (2, 2))
    logits = torch.einsum("hgd,htd->hgt", grouped, keys[0]).unflatten(2, (10, 4))
    assert (bound[..., None] >= logits - 1e-12).all()
    assert (bound - logits.amax(-1)).min() >= -1e-12


def test_boxes_grow_with_rows_of_unequal_length() -> None:
    _, keys, values = states(40, rows=2)
    pyramid = Pyramid(LEVELS)
    for first, last in ((0, 9), (9, 22), (22, 40)):
        counts = [last - first, (last - first) // 2]
        pyramid.append(keys[:, :, first:last], values[:, :, first:last], counts)
        Boxes.of(pyramid, LEVELS)
    grown = Boxes.of(pyramid, LEVELS)
    pyramid.derived.clear()
    afresh = Boxes.of(pyramid, LEVELS)
    for row, chunks in enumerate(grown.chunks):
        assert chunks == pyramid.lengths[row] // 4
        assert torch.equal(grown.low[row, :, :chunks], afresh.low[row, :, :chunks])
        assert torch.equal(grown.high[row, :, :chunks], afresh.high[row, :, :chunks])


@pytest.mark.parametrize("policy", [ByMean(8, 1, sink=False, per_head=True), ByBound(8, 1, sink=False)])
def test_the_current_block_is_always_read(policy: ByMean | ByBound) -> None:
    queries, keys, values = states(40)
    pyramid = Pyramid.of(keys, values, LEVELS)
    blocks = blocks_at([16, 19, 39])
    voters = Voters(queries[0, :, [16, 19, 39]].transpose(0, 1)[:, :, None], torch.ones(3, 1, dtype=torch.bool))
    cover = policy.choose(voters, blocks, pyramid, LEVELS)
    assert cover.window_start.tolist() == [16, 16, 36]
    assert cover.opened.shape[1:] == ((4, 2) if policy.per_head else (2, 2))


def test_one_block_is_block_diagonal() -> None:
    """MoBA with a single block reads its own block and nothing else (the released code reads everything)."""
    queries, keys, values = states(14)
    policy = ByMean(0, 1, sink=False, per_head=True)
    plan = Plan.of([Schedule.uniform(1)], [0], [14], 14, 0)
    out = read(queries, Pyramid.of(keys, values, LEVELS), plan, Reading(policy, LEVELS), 0.3)
    k, v = (part.repeat_interleave(2, 1) for part in (keys, values))
    place = torch.arange(14)
    seen = (place[:, None] >= place) & (place[:, None] // 4 == place // 4)
    logits = (0.3 * queries @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(out, torch.softmax(logits, -1) @ v, atol=1e-12, rtol=0)


def test_a_prompt_is_dense_for_methods_that_serve_generation() -> None:
    queries, keys, values = states(40)
    schedule = Schedule.reading(20, 6, block=8, question_block=4, lookahead="none")
    assert schedule.prompt == 26
    out = {}
    for dense_prompt in (True, False):
        reading = Reading(ByBound(4, 1, sink=False), LEVELS, dense_prompt=dense_prompt)
        plan = Plan.of([schedule], [0], [40], 40, 0, dense_prompt=dense_prompt)
        out[dense_prompt] = read(queries, Pyramid.of(keys, values, LEVELS), plan, reading, 0.3)
    k, v = (part.repeat_interleave(2, 1) for part in (keys, values))
    future = torch.ones(40, 40, dtype=torch.bool).triu(1)
    full = torch.softmax((0.3 * queries @ k.transpose(-1, -2)).masked_fill(future, -torch.inf), -1) @ v
    torch.testing.assert_close(out[True][:, :, :26], full[:, :, :26], atol=1e-12, rtol=0)
    assert torch.equal(out[True][:, :, 26:], out[False][:, :, 26:])
    assert not torch.allclose(out[True][:, :, 26:], full[:, :, 26:], atol=1e-3)


def test_declared() -> None:
    assert methods.get("moba").choice == "per head"
    assert methods.get("quest").phase == "decode"

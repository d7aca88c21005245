"""Compact search keys: their basis, and blocks before and after the tokens that give it, searched together."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.policies import Scored, compact
from mgam.policies.base import Voters
from mgam.policies.compact import Compact, CompactKeys, principal
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Schedule


@pytest.mark.parametrize("rows", [1, 2])
def test_early_and_late_blocks_are_scored_as_they_are_alone(rows: int) -> None:
    torch.manual_seed(rows)
    levels, tokens, size = Levels((1, 8, 32), 4), 240, 16
    keys = torch.randn(rows, 2, tokens, 32)
    pyramid = Pyramid.of(keys, keys, levels)
    pieces = [(row, piece) for row in range(rows) for piece in Schedule.uniform(size, "block").pieces(0, tokens)]
    blocks = Blocks.of(pieces)
    voters = Voters(2 * torch.randn(len(blocks), 4, size, 32), torch.ones(len(blocks), size, dtype=torch.bool))
    short = Scored(compact=Compact(dims=16, bits=16, calibrate=96))
    together = short.scores(voters, blocks, pyramid, levels)
    flat = Scored().scores(voters, blocks, pyramid, levels)
    late = blocks.decide >= 96
    assert torch.allclose(together[~late], flat[~late], atol=1e-6)
    assert not torch.allclose(together[late], flat[late], atol=1e-3)
    for number in late.nonzero().flatten().tolist():
        one = slice(number, number + 1)
        alone = short.scores(Voters(voters.queries[one], voters.live[one]), blocks[one], pyramid, levels)
        assert torch.allclose(together[number, :, : alone.shape[-1]], alone[0], atol=1e-5)
        assert not together[number, :, alone.shape[-1] :].any()


@pytest.mark.parametrize("compact", [None, Compact(dims=16, bits=16, calibrate=96)])
def test_questions_are_heard_in_full_beside_texts_that_are_not(compact: Compact | None) -> None:
    """Blocks of a text and a question's, searched together, are scored as alone; of the question every query counts."""
    torch.manual_seed(3)
    levels, tokens = Levels((1, 8, 32), 4), 244
    keys = torch.randn(2, 2, tokens, 32)
    pyramid = Pyramid.of(keys, keys, levels)
    schedule = Schedule.reading(240, 4, block=40, question_block=4)
    blocks = Blocks.of([(row, piece) for row in range(2) for piece in schedule.pieces(0, tokens)])
    assert blocks.voting.tolist() == [40] * 6 + [4] + [40] * 6 + [4]
    live = torch.arange(40) < blocks.voting[:, None]
    voters = Voters(2 * torch.randn(len(blocks), 4, 40, 32), live)
    policy = Scored(compact=compact, every=8, whole=4)
    together = policy.scores(voters, blocks, pyramid, levels)
    for number in range(len(blocks)):
        one = slice(number, number + 1)
        alone = policy.scores(voters[one], blocks[one], pyramid, levels)
        assert torch.allclose(together[number, :, : alone.shape[-1]], alone[0], atol=1e-5)
    full = Scored(compact=compact).scores(voters, blocks, pyramid, levels)
    asked = blocks.voting == 4
    assert torch.allclose(together[asked], full[asked], atol=1e-5)
    heard = together[~asked][1:].sum((1, 2))
    assert torch.allclose(heard[heard > 0], torch.tensor(4 * 5.0)), "five voters of forty, of four heads"
    few = replace(policy, whole=0).scores(voters, blocks, pyramid, levels)
    assert not torch.allclose(few[asked], together[asked], atol=1e-3)


@pytest.mark.parametrize("every", [1, 8])
def test_blocks_do_not_hold_themselves(every: int) -> None:
    """What is found once of blocks is kept with them, and goes with them: nothing waits for the garbage collector."""
    keys = torch.randn(1, 2, 240, 32)
    pyramid, levels = Pyramid.of(keys, keys, Levels((1, 8, 32), 4)), Levels((1, 8, 32), 4)
    blocks = Blocks.of([(0, piece) for piece in Schedule.reading(236, 4, block=40).pieces(80, 240)])
    voters = Voters(torch.randn(len(blocks), 4, 40, 32), torch.arange(40) < blocks.voting[:, None])
    gc.collect()
    gc.disable()
    try:
        Scored(16, 16, every=every).choose(voters, blocks, pyramid, levels)
        Scored(16, 16, every=every, compact=Compact(dims=16, bits=16, calibrate=96)).choose(
            voters, blocks, pyramid, levels
        )
        gone = weakref.ref(blocks)
        del blocks
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("rank", [0, 1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_is_orthonormal_whatever_the_rank_of_the_keys(rank: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(rank)
    parts = [torch.randint(0, 2, shape, generator=rng).to(dtype) for shape in ((3, 500, rank), (3, rank, 64))]
    keys = parts[0] @ parts[1]
    basis = principal(keys.mT @ keys, 32)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(32, dtype=dtype).expand(3, -1, -1), atol=1e-5, rtol=0)
    if rank <= 8:
        torch.testing.assert_close(keys @ basis @ basis.mT, keys, atol=1e-2, rtol=1e-3)


def test_eight_bits_are_refused_where_kernels_cannot_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(1, 2, 64, 32)
    pyramid, levels = Pyramid.of(keys, keys, Levels((1, 8, 32), 4)), Levels((1, 8, 32), 4)
    monkeypatch.setattr(compact, "serve", lambda states: True)
    monkeypatch.setattr(compact, "capability", lambda device: (8, 6))
    with pytest.raises(SettingError, match=r"search_bits=8: .* 8\.9 or newer, .* 8\.6; choose search_bits=16"):
        CompactKeys.of(pyramid, levels, Compact(dims=16, bits=8, calibrate=96))
    assert CompactKeys.of(pyramid, levels, Compact(dims=16, bits=16, calibrate=96)).chunks == [0]

"""Blocks before and after the tokens that give a basis are searched together as each is alone."""

from __future__ import annotations

import pytest
import torch

from mgam.levels import Levels
from mgam.policies import Scored
from mgam.policies.base import Voters
from mgam.policies.compact import Compact
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
    compact = Scored(compact=Compact(dims=16, bits=16, calibrate=96))
    together = compact.scores(voters, blocks, pyramid, levels)
    flat = Scored().scores(voters, blocks, pyramid, levels)
    late = blocks.decide >= 96
    assert torch.allclose(together[~late], flat[~late], atol=1e-6)
    assert not torch.allclose(together[late], flat[late], atol=1e-3)
    for number in late.nonzero().flatten().tolist():
        one = slice(number, number + 1)
        alone = compact.scores(Voters(voters.queries[one], voters.live[one]), blocks[one], pyramid, levels)
        assert torch.allclose(together[number, :, : alone.shape[-1]], alone[0], atol=1e-5)
        assert not together[number, :, alone.shape[-1] :].any()

"""LongHeads against its definition, written out for one chunk at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgam import methods
from mgam.engine import Reading, read
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies.heads import ByChunkKey, ChunkKeys
from mgam.positions import Positions, Rotary, rotate
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule

CHUNK, DIM = 4, 8
LEVELS = Levels((1, CHUNK), 4)
ROTARY = Rotary.plain(DIM, 64)
READING = Reading(ByChunkKey(8, CHUNK + 1, per_head=True), LEVELS, Positions.granular(ROTARY, 24))


def states(tokens: int, rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(rows, 4, tokens, DIM), (rows, 2, tokens, DIM), (rows, 2, tokens, DIM)]
    a, b, c = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return a, b, c


def stream(parts: tuple[Tensor, Tensor, Tensor], cuts: list[int], schedule: Schedule) -> tuple[Tensor, Pyramid]:
    queries, keys, values = parts
    pyramid, outs = Pyramid(LEVELS), []
    for start, stop in zip([0, *cuts], [*cuts, queries.shape[2]], strict=True):
        pyramid.append(keys[:, :, start:stop], values[:, :, start:stop])
        plan = Plan.of(
            [schedule] * len(queries), [start] * len(queries), [stop - start] * len(queries), stop - start, 0
        )
        outs.append(read(queries[:, :, start:stop], pyramid, plan, READING, 0.3))
    return torch.cat(outs, 2), pyramid


def kept(pyramid: Pyramid) -> ChunkKeys:
    found = pyramid.carried[ChunkKeys]
    assert isinstance(found, ChunkKeys)
    return found


def test_chunk_keys_are_as_defined_wherever_the_chunk_stands() -> None:
    queries, keys, values = states(22)
    _, pyramid = stream((queries, keys, values), [3, 4, 13], Schedule.uniform(1))
    cos, sin = ROTARY.table(queries.device, queries.dtype)
    for head in range(4):
        for chunk in range(5):
            own = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            q, k = (rotate(part, cos[:CHUNK], sin[:CHUNK]) for part in (queries[0, head, own], keys[0, head // 2, own]))
            out = torch.softmax(q @ k.T / DIM**0.5, -1) @ values[0, head // 2, own]
            expected = torch.softmax(out.mean(0) @ k.T / DIM**0.5, -1) @ k
            torch.testing.assert_close(kept(pyramid).keys[0, head, chunk], expected)


def test_the_chunk_before_the_query_and_its_own_key_are_read() -> None:
    """The released prefill cuts off the query's own key; reading does not, and generation agrees with it."""
    parts = states(30)
    whole, _ = stream(parts, [], Schedule.uniform(1))
    single, _ = stream(parts, list(range(1, 30)), Schedule.uniform(1))
    torch.testing.assert_close(whole, single, atol=1e-9, rtol=0)
    changed = (parts[0], parts[1], parts[2].clone())
    changed[2][:, :, 29] += 1
    moved = (stream(changed, [], Schedule.uniform(1))[0] - whole).abs().amax((0, 1, 3))
    assert moved[29] > 1e-3
    assert not moved[:29].any()


def test_rows_move_and_a_cache_is_cropped() -> None:
    parts = states(30, rows=2)
    _, pyramid = stream(parts, [], Schedule.uniform(4))
    pyramid.select(torch.tensor([1, 1, 0]))
    assert torch.equal(kept(pyramid).keys[0, :, :7], kept(pyramid).keys[1, :, :7])
    pyramid.crop([3, 3, 3])
    assert sum(part.shape[1] for part in kept(pyramid).tail[0]) == 27 - kept(pyramid).begin[0]
    with pytest.raises(SettingError, match="cropped"):
        pyramid.crop([10, 10, 10])


def test_it_begins_with_the_text() -> None:
    queries, keys, values = states(10)
    pyramid = Pyramid(LEVELS)
    pyramid.append(keys, values)
    plan = Plan.of([Schedule.uniform(1)], [8], [2], 2, 0)
    with pytest.raises(SettingError, match="first token"):
        read(queries[:, :, 8:], pyramid, plan, READING, 0.3)


def test_positions_stay_within_the_trained_window() -> None:
    """The whole point: whatever the length, ranks stay below what the model was trained for."""
    settings = methods.get("longheads").settings()
    reach = settings.budget + settings.window + 2 * settings.levels[1] + settings.block
    assert reach < 2400
    out, _ = stream(states(400), [], Schedule.uniform(1))
    assert torch.isfinite(out).all()

"""The pyramid: growing in any cuts, forgetting, and moving rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgam.levels import Levels
from mgam.pyramid import Pyramid

LEVELS = Levels((1, 4, 16), 2)
HEADS, DIM = 2, 3
examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """Storage that nothing was written to holds NaN."""
    make = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "new_empty", lambda like, *args, **options: make(like, *args, **options).fill_(torch.nan)
        )
        yield


def states(
    tokens: int, rows: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, rows, HEADS, tokens, DIM, generator=rng, dtype=torch.float64).to(dtype)
    return one, other


def assert_holds(pyramid: Pyramid, keys: torch.Tensor, values: torch.Tensor, lengths: list[int]) -> None:
    """Every level of every row is what the definition says: means over complete chunks from the row's start on."""
    assert pyramid.lengths == lengths
    assert pyramid.tokens == max(lengths, default=0)
    for row, length in enumerate(lengths):
        for level, size in enumerate(LEVELS.sizes):
            whole = length // size
            for kept, given_states in ((pyramid.keys, keys), (pyramid.values, values)):
                expected = given_states[row, :, : whole * size].unflatten(1, (whole, size)).mean(2)
                torch.testing.assert_close(kept[level][row, :, :whole], expected)
        chunks = length // LEVELS.chunk
        fine = (
            keys[row, :, : chunks * LEVELS.chunk].unflatten(1, (chunks, LEVELS.search_per_chunk, LEVELS.search)).mean(3)
        )
        assert pyramid.search is not None
        torch.testing.assert_close(pyramid.search[row, :, :, :chunks], fine.transpose(1, 2).to(pyramid.search.dtype))


def test_rows_at_different_places_grow_token_by_token() -> None:
    lengths, more = [1, 12, 6], 13
    keys, values = states(max(lengths) + more, rows=3)
    pyramid = Pyramid(LEVELS)
    new = max(lengths)
    given_states = []
    for part in (keys, values):
        first = torch.full((3, HEADS, new, DIM), torch.nan, dtype=part.dtype)
        for row, length in enumerate(lengths):
            first[row, :, new - length :] = part[row, :, :length]
        given_states.append(first)
    pyramid.append(*given_states, lengths)
    for step in range(more):
        ends = [length + step for length in lengths]
        one, other = (
            torch.stack([part[row, :, end : end + 1] for row, end in enumerate(ends)]) for part in (keys, values)
        )
        pyramid.append(one, other)
    assert_holds(pyramid, keys, values, [length + more for length in lengths])


@examples
@given(st.lists(st.integers(0, 23), min_size=1, max_size=6), st.integers(0, 80))
def test_appended_in_any_cuts(cuts: list[int], reserved: int) -> None:
    tokens = sum(cuts)
    keys, values = states(tokens)
    pyramid, start = Pyramid(LEVELS), 0
    if reserved:
        pyramid.reserve(reserved)
    for count in cuts:
        pyramid.append(keys[:, :, start : start + count], values[:, :, start : start + count])
        start += count
    assert_holds(pyramid, keys, values, [tokens, tokens])
    assert_holds(Pyramid.of(keys, values, LEVELS), keys, values, [tokens, tokens])


@examples
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19), st.integers(0, 19)), min_size=1, max_size=5))
def test_rows_grow_by_their_own_counts(calls: list[tuple[int, int, int]]) -> None:
    """New states stand at the right of the call; what stands before them is padding."""
    keys, values = states(100, rows=3)
    pyramid, lengths = Pyramid(LEVELS), [0, 0, 0]
    for counts in calls:
        columns = max(counts) + 1
        call = [keys.new_full((3, HEADS, columns, DIM), torch.nan) for _ in range(2)]
        for row, count in enumerate(counts):
            for part, given_states in zip(call, (keys, values), strict=True):
                part[row, :, columns - count :] = given_states[row, :, lengths[row] : lengths[row] + count]
        pyramid.append(call[0], call[1], counts)
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
    assert_holds(pyramid, keys, values, lengths)


@examples
@given(st.integers(1, 70), st.tuples(st.integers(0, 80), st.integers(0, 80)), st.integers(0, 40))
def test_cropped_and_filled_again(tokens: int, remove: tuple[int, int], more: int) -> None:
    keys, values = states(tokens)
    pyramid = Pyramid(LEVELS)
    pyramid.append(keys, values)
    pyramid.crop(remove)
    lengths = [max(0, tokens - count) for count in remove]
    assert_holds(pyramid, keys, values, lengths)
    new_keys, new_values = states(more, seed=1)
    pyramid.append(new_keys, new_values)
    parts = []
    for old, new in ((keys, new_keys), (values, new_values)):
        whole = old.new_full((2, HEADS, max(lengths) + more, DIM), torch.nan)
        for row, length in enumerate(lengths):
            whole[row, :, : length + more] = torch.cat((old[row, :, :length], new[row]), 1)
        parts.append(whole)
    assert_holds(pyramid, parts[0], parts[1], [length + more for length in lengths])


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1, 1], [1], [0, 1]])
def test_rows_are_kept_repeated_and_reordered(rows: list[int]) -> None:
    keys, values = states(40)
    pyramid = Pyramid(LEVELS)
    pyramid.append(keys, values, [37, 22])
    kept = [torch.stack([part[0, :, 3:], part[1, :, 18:].new_zeros(HEADS, 37, DIM)]) for part in (keys, values)]
    for part, given_states in zip(kept, (keys, values), strict=True):
        part[1, :, :22] = given_states[1, :, 18:]
    pyramid.select(torch.tensor(rows))
    lengths = [[37, 22][row] for row in rows]
    assert_holds(pyramid, kept[0][rows], kept[1][rows], lengths)
    more = states(9, rows=len(rows), seed=2)
    pyramid.append(*more)
    longer = []
    for part, new in zip(kept, more, strict=True):
        whole = part.new_full((len(rows), HEADS, 46, DIM), torch.nan)
        for place, row in enumerate(rows):
            whole[place, :, : lengths[place] + 9] = torch.cat((part[row, :, : lengths[place]], new[place]), 1)
        longer.append(whole)
    assert_holds(pyramid, longer[0], longer[1], [length + 9 for length in lengths])


def test_growth_copies_little() -> None:
    """Reserved storage is made once; without it, storage grows in proportion, so that copies add up to a few texts."""
    keys, values = states(4000, rows=1)
    reserved, free, seen = Pyramid(LEVELS), Pyramid(LEVELS), set()
    reserved.reserve(4000)
    places = set()
    for start in range(0, 4000, 40):
        for pyramid in (reserved, free):
            pyramid.append(keys[:, :, start : start + 40], values[:, :, start : start + 40])
        places.add(reserved.keys[0].data_ptr())
        seen.add(free.keys[0].shape[2])
    assert len(places) == 1
    assert sum(seen) < 8 * 4000
    assert max(seen) < 1.3 * 4000


def test_a_pyramid_can_be_differentiated() -> None:
    keys, values = (part.requires_grad_() for part in states(21))
    pyramid = Pyramid.of(keys, values, LEVELS)
    total = torch.stack([part.sum() for part in (*pyramid.keys, *pyramid.values)]).sum()
    grads = torch.autograd.grad(total, (keys, values))
    expected = torch.ones(21, dtype=torch.float64)
    expected[:20] += 1 / 4
    expected[:16] += 1 / 16
    for grad in grads:
        torch.testing.assert_close(grad, expected[:, None].expand_as(grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_keep_their_type(dtype: torch.dtype) -> None:
    pyramid = Pyramid(LEVELS)
    pyramid.append(*states(40, dtype=dtype))
    assert {part.dtype for part in (*pyramid.keys, *pyramid.values)} == {dtype}
    assert pyramid.search is not None
    assert pyramid.search.dtype == torch.bfloat16

"""The cover: partitions, index lists and ranks against brute force."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgam.cover import Cover, cover_of, dense_cover, indices, refine, summaries_at_most, window_start
from mgam.levels import Levels
from mgam.schedule import Blocks, Schedule

examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)
LEVELS = st.sampled_from(
    [Levels((1, 4), 2), Levels((1, 4, 16), 2), Levels((1, 2, 6, 12), 1), Levels((1, 3, 9, 27, 54), 1)]
)


@st.composite
def masks(draw: st.DrawFn) -> tuple[Levels, torch.Tensor, torch.Tensor]:
    """Levels, opened chunks (N, H, C) and window starts (N,) that are multiples of the chunk size."""
    levels = draw(LEVELS)
    blocks, heads, chunks = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 40))
    start = torch.tensor([draw(st.integers(0, chunks)) * levels.chunk for _ in range(blocks)])
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return levels, torch.rand(blocks, heads, chunks, generator=rng) < density, start


def brute(levels: Levels, opened: set[int], start: int) -> list[set[int]]:
    """Largest chunks that end before the window and hold nothing opened, nor the sink; top down."""
    found: list[set[int]] = [set() for _ in levels.sizes[1:]]
    taken = [token // levels.chunk in opened for token in range(start)]
    for level in range(levels.top, 0, -1):
        size = levels.sizes[level]
        for index in range(start // size):
            tokens = range(index * size, (index + 1) * size)
            free = not any(taken[token] for token in tokens)
            if free and not (level > 1 and index == 0):
                found[level - 1].add(index)
                for token in tokens:
                    taken[token] = True
    assert all(taken)
    return found


@examples
@given(masks())
def test_refine_is_the_coarsest_partition(made: tuple[Levels, torch.Tensor, torch.Tensor]) -> None:
    levels, opened, start = made
    read = refine(opened, start, levels)
    for block in range(opened.shape[0]):
        for head in range(opened.shape[1]):
            chosen = set(opened[block, head].nonzero().flatten().tolist())
            found = [set(mask[block, head].nonzero().flatten().tolist()) for mask in read]
            assert found == brute(levels, chosen, int(start[block]))


@examples
@given(masks())
def test_refine_splits_what_it_is_told_to(made: tuple[Levels, torch.Tensor, torch.Tensor]) -> None:
    levels, opened, start = made
    keep = [
        torch.ones(*opened.shape[:2], -(-opened.shape[2] * levels.chunk // size), dtype=torch.bool)
        for size in levels.sizes[2:]
    ]
    read = refine(opened, start, levels, keep=keep)
    assert not any(mask.any() for mask in read[1:])
    complete = (torch.arange(1, opened.shape[2] + 1) * levels.chunk)[None] <= start[:, None]
    assert torch.equal(read[0], complete[:, None] & ~opened)


@examples
@given(masks(), st.integers(0, 3), st.booleans())
def test_known_bounds_hold(made: tuple[Levels, torch.Tensor, torch.Tensor], spare: int, sink: bool) -> None:
    """`most` changes the width of a cover and nothing else."""
    levels, opened, start = made
    free = cover_of(opened, start, levels, sink=sink)
    most = int((free.opened >= 0).sum(-1).max()) + spare if free.opened.numel() else spare
    bound = cover_of(opened, start, levels, most=most, sink=sink)
    split = most if sink else most + 2
    limits = [min(most, opened.shape[2]), *summaries_at_most(opened.shape[2], split, levels)]
    for one, other, limit in zip((free.opened, *free.summaries), (bound.opened, *bound.summaries), limits, strict=True):
        assert one.shape[-1] <= limit == other.shape[-1]
        assert torch.equal(other[..., : one.shape[-1]], one)
        assert (other[..., one.shape[-1] :] == -1).all()


@examples
@given(masks(), st.sampled_from(["summaries", "drop"]))
def test_cover_of_opens_the_sink_and_nothing_of_the_window(
    made: tuple[Levels, torch.Tensor, torch.Tensor], rest: str
) -> None:
    levels, opened, start = made
    before = opened.clone()
    cover = cover_of(opened, start, levels, rest=rest)
    assert torch.equal(opened, before), "the caller's mask is left alone"
    for block in range(opened.shape[0]):
        chunks = int(start[block]) // levels.chunk
        for head in range(opened.shape[1]):
            chosen = {c for c in opened[block, head].nonzero().flatten().tolist() if c < chunks} | (
                {0} if chunks else set()
            )
            assert set(cover.opened[block, head].tolist()) - {-1} == chosen
            left = brute(levels, chosen, int(start[block])) if rest == "summaries" else [set()] * levels.top
            assert [set(index[block, head].tolist()) - {-1} for index in cover.summaries] == left


@examples
@given(st.integers(0, 6), st.integers(1, 9), st.integers(0, 99))
def test_indices_are_sorted_places(rows: int, width: int, seed: int) -> None:
    mask = torch.rand(rows + 1, 2, width, generator=torch.Generator().manual_seed(seed)) < 0.4
    for most in (None, int(mask.sum(-1).max()), width):
        found = indices(mask, most)
        for row, places in zip(mask.flatten(0, 1), found.flatten(0, 1).tolist(), strict=True):
            real = row.nonzero().flatten().tolist()
            assert places == real + [-1] * (len(places) - len(real))
    assert indices(mask[..., :0]).shape == (rows + 1, 2, 0)


@examples
@given(masks())
def test_ranks_count_back_from_the_window(made: tuple[Levels, torch.Tensor, torch.Tensor]) -> None:
    levels, opened, start = made
    cover = cover_of(opened, start, levels)
    first, others = cover.ranks()
    for block in range(opened.shape[0]):
        for head in range(opened.shape[1]):
            placed = {}
            for chunk, rank in zip(cover.opened[block, head].tolist(), first[block, head].tolist(), strict=True):
                if chunk >= 0:
                    placed.update({chunk * levels.chunk + step: rank + step for step in range(levels.chunk)})
            for size, index, ranks in zip(levels.sizes[1:], cover.summaries, others, strict=True):
                for chunk, rank in zip(index[block, head].tolist(), ranks[block, head].tolist(), strict=True):
                    if chunk >= 0:
                        placed[chunk * size] = rank
            assert [placed[token] for token in sorted(placed)] == list(range(-len(placed), 0))
            assert len(placed) == int(cover.entries()[block, head])


@examples
@given(st.integers(0, 200), st.integers(1, 50), LEVELS)
def test_window_starts_on_a_chunk_and_holds_enough(decide: int, window: int, levels: Levels) -> None:
    start = int(window_start(torch.tensor([decide]), window, levels))
    assert start % levels.chunk == 0
    assert start == 0 or window <= decide + 1 - start < window + levels.chunk


def test_dense_cover_is_dense() -> None:
    blocks = Blocks.of([(0, piece) for piece in Schedule.uniform(3).pieces(0, 10)])
    cover = dense_cover(blocks, 2, Levels((1, 4, 16), 2), torch.device("cpu"))
    assert cover.is_dense
    assert cover.width == 0
    assert cover.entries_per_level(blocks) == [55.0, 0.0, 0.0]


def test_a_slice_is_a_cover() -> None:
    levels = Levels((1, 4, 16), 2)
    cover = cover_of(torch.rand(5, 2, 9) < 0.3, torch.full((5,), 36), levels)
    part = cover[1:3]
    assert isinstance(part, Cover)
    assert torch.equal(part.entries(), cover.entries()[1:3])

"""The schedule: pieces tile every call, borders follow from positions alone, and votes stay in the past."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgam.engine import history
from mgam.errors import SettingError
from mgam.plan import Plan
from mgam.schedule import Blocks, Piece, Schedule, Span

examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def schedules(draw: st.DrawFn, lookahead: str | None = None) -> Schedule:
    ends = sorted(draw(st.lists(st.integers(0, 60), max_size=3)))
    kinds = st.sampled_from(["none", "block"]) if lookahead is None else st.just(lookahead)
    return Schedule(tuple(Span(stop, draw(st.integers(1, 9)), draw(kinds)) for stop in (*ends, None)))


calls = st.tuples(st.integers(0, 70), st.integers(0, 30)).map(lambda pair: (pair[0], sum(pair)))
dense = st.integers(0, 40)


def block_at(schedule: Schedule, position: int, dense_until: int) -> tuple[int, int | None, Span]:
    """First position, end and span of the block that a position lies in, by walking through the spans."""
    begin = 0
    for span in schedule.spans:
        if span.stop is None or position < span.stop:
            first = begin + (position - begin) // span.block * span.block
            stop = first + span.block if span.stop is None else min(first + span.block, span.stop)
            if position < dense_until:
                return first, min(stop, dense_until), span
            return max(first, dense_until), stop, span
        begin = span.stop
    raise AssertionError


@examples
@given(schedules(), calls, dense)
def test_pieces_tile_a_call(schedule: Schedule, call: tuple[int, int], dense_until: int) -> None:
    pieces = list(schedule.pieces(*call, dense_until))
    assert [place for piece in pieces for place in range(piece.start, piece.stop)] == list(range(*call))
    for piece in pieces:
        assert piece.dense == (piece.stop <= dense_until) == (piece.start < dense_until)


@examples
@given(schedules(), calls, dense)
def test_a_piece_lies_in_one_block(schedule: Schedule, call: tuple[int, int], dense_until: int) -> None:
    for piece in schedule.pieces(*call, dense_until):
        places = range(piece.start, piece.stop)
        first, stop, span = block_at(schedule, piece.start, dense_until)
        assert {block_at(schedule, place, dense_until)[:2] for place in places} == {(first, stop)}
        if piece.dense:
            continue
        assert piece.decide == first
        if span.lookahead == "block" and (piece.start, piece.stop) == (first, stop):
            assert (piece.vote_from, piece.vote_to) == (first, stop)
        else:
            assert piece.vote_to == first + 1


@examples
@given(schedules(lookahead="none"), calls, dense)
def test_decisions_do_not_depend_on_the_call(schedule: Schedule, call: tuple[int, int], dense_until: int) -> None:
    def decisions(pieces: list[Piece]) -> dict[int, tuple[int, int, int, bool]]:
        return {
            place: (piece.decide, piece.vote_from, piece.vote_to, piece.dense)
            for piece in pieces
            for place in range(piece.start, piece.stop)
            if not piece.dense
        }

    start, stop = call
    whole = decisions(list(schedule.pieces(0, 120, dense_until)))
    part = decisions(list(schedule.pieces(start, stop, dense_until)))
    assert part == {place: found for place, found in whole.items() if start <= place < stop}


@examples
@given(schedules(), calls, dense)
def test_votes_come_from_what_is_known(schedule: Schedule, call: tuple[int, int], dense_until: int) -> None:
    """Voters lie in the past of the decision, or in the block; `history` queries before the call are enough."""
    start, stop = call
    for piece in schedule.pieces(start, stop, dense_until):
        assert 0 <= piece.vote_from < piece.vote_to <= stop
        assert piece.decide <= piece.start
        assert piece.vote_from >= max(0, start - history(schedule, start))


def test_reading_puts_borders_where_the_parts_end() -> None:
    starts = [piece.start for piece in Schedule.reading(20, 7, block=8, question_block=5).pieces(0, 30)]
    assert starts == [0, 8, 16, 20, 25, 27, 28, 29]
    assert Schedule.reading(0, 0) == Schedule((Span(None, 1),))


@pytest.mark.parametrize(
    "spans",
    [
        (),
        (Span(4, 2),),
        (Span(None, 2), Span(None, 1)),
        (Span(None, 2), Span(4, 1)),
        (Span(8, 2), Span(4, 2), Span(None, 1)),
        (Span(None, 0),),
        (Span(-3, 2), Span(None, 1)),
    ],
)
def test_spans_that_cannot_work(spans: tuple[Span, ...]) -> None:
    with pytest.raises(SettingError):
        Schedule(spans)


def test_blocks_keep_their_pieces() -> None:
    pieces = list(Schedule.uniform(4).pieces(3, 14))
    blocks = Blocks.of([(2, piece) for piece in pieces])
    assert len(blocks) == len(pieces)
    assert blocks.row.tolist() == [2] * len(pieces)
    assert blocks.stop.tolist() == [piece.stop for piece in pieces]
    assert (blocks.size, blocks.votes) == (4, 4)
    part = blocks[1:3]
    assert part.start.tolist() == [4, 8]
    assert part.size == blocks.size
    assert len(Blocks.of([])) == 0


@examples
@given(st.lists(st.tuples(schedules(), calls), min_size=1, max_size=3), dense)
def test_a_plan_holds_every_piece_once(rows: list[tuple[Schedule, tuple[int, int]]], dense_until: int) -> None:
    before = [start for _, (start, _) in rows]
    counts = [stop - start for _, (start, stop) in rows]
    columns = max(counts) + 2
    plan = Plan.of([schedule for schedule, _ in rows], before, counts, columns, dense_until)
    assert (plan.first + columns).tolist() == [stop for _, (_, stop) in rows]
    assert plan.before.tolist() == before
    found = sorted(
        (row, start, length, is_dense)
        for is_dense, blocks in plan.groups
        for row, start, length in zip(blocks.row.tolist(), blocks.start.tolist(), blocks.length.tolist(), strict=True)
    )
    assert found == sorted(
        (row, piece.start, piece.stop - piece.start, piece.dense)
        for row, (schedule, call) in enumerate(rows)
        for piece in schedule.pieces(*call, dense_until)
    )
    for _, blocks in plan.groups:
        assert blocks.size == int(blocks.length.max()) <= 2 * max(int(blocks.length.min()), blocks.votes)


def test_a_plan_for_rows_at_the_left() -> None:
    plan = Plan.of([Schedule.uniform(4)] * 2, [0, 0], [5, 3], 6, 0, first=[0, -1])
    assert plan.first.tolist() == [0, -1]


def test_equal_spans_are_equal() -> None:
    """Plans are kept by their schedules."""
    one = Schedule.reading(9, 4)
    assert one == replace(one)
    assert hash(one) == hash(Schedule.reading(9, 4))

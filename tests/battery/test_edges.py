"""P8, P10 and P11: odd lengths, rows of unequal lengths, and numbers at the ends of their range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mgam.engine import history, read
from mgam.plan import Plan
from mgam.pyramid import Pyramid
from mgam.schedule import Lookahead, Schedule

from .oracle import blocks_of, by_hand, dense, reads
from .test_causality import per_query
from .trial import DIM, GROUP, HEADS, ROTATED, SCALE, Frozen, Spy, States, Trial


@pytest.fixture
def lookahead() -> Lookahead:
    """Who decided matters to rows only."""
    return "block"


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9, 17, 33])
def test_odd_lengths(trial: Trial, tokens: int) -> None:
    """P8: one token, fewer than a chunk, not divisible, shorter than the window: the last query by the textbook."""
    states = queries, keys, values = trial.states(tokens)
    out, chosen = trial.covers(states, trial.schedule(max(0, tokens - 3), 2))
    checked = 0
    for _, _, stop, _, cover, number in blocks_of(chosen):
        if stop == tokens:
            for head in range(HEADS * GROUP):
                entries = reads(cover, number, head * cover.opened.shape[1] // (HEADS * GROUP), tokens - 1)
                one = queries[0, head, -1], keys[0, head // GROUP], values[0, head // GROUP]
                expected = by_hand(*one, entries, SCALE, trial.case.mass, trial.rotated)
                torch.testing.assert_close(out[0, head, -1].double().cpu(), expected, **trial.tolerance)
                checked += 1
    assert checked == HEADS * GROUP
    if tokens <= 8:
        torch.testing.assert_close(out.double().cpu(), dense(*states, SCALE, trial.rotated), **trial.tolerance)


def test_a_window_longer_than_the_text(trial: Trial) -> None:
    """P8."""
    states = trial.states(21)
    out = trial.run(states, policy=trial.case.policy(SCALE, window=22))
    torch.testing.assert_close(out.double().cpu(), dense(*states, SCALE, trial.rotated), **trial.tolerance)


def test_nothing_new(trial: Trial) -> None:
    """P8: an empty text, and calls without tokens between others."""
    empty = trial.states(0, rows=2)
    assert trial.run(empty).shape == empty[0].shape
    states = trial.states(30)
    torch.testing.assert_close(trial.run(states, cuts=[0, 16, 16]), trial.run(states), **trial.tolerance)
    with_empty_span = replace(trial.schedule(16, 0), spans=(trial.schedule(0, 0).spans[0],))
    torch.testing.assert_close(trial.run(states, trial.schedule(0, 0)), trial.run(states, with_empty_span))


LENGTHS = [37, 5, 64, 1, 0]
UNTURNED = torch.arange(DIM) >= ROTATED


def padded(trial: Trial, schedules: list[Schedule], calls: list[int]) -> tuple[list[Tensor], Spy, list[States]]:
    """Rows of unequal lengths at the right of their columns, padded with NaN, read in calls of so many columns."""
    width = max(LENGTHS)
    singles = [trial.states(length, seed=row) for row, length in enumerate(LENGTHS)]
    batch = []
    for part in range(3):
        like = singles[0][part]
        states = like.new_full((len(LENGTHS), like.shape[1], width, like.shape[3]), torch.nan)
        for row, length in enumerate(LENGTHS):
            states[row, :, width - length :] = singles[row][part][0]
        batch.append(states)
    queries, keys, values = batch
    pyramid, kept, spy, outs = Pyramid(trial.levels), max(map(history, schedules)), Spy(trial.reading().policy), []
    reading, start = replace(trial.reading(), policy=spy), 0
    for columns in calls:
        stop = start + columns
        before = [max(0, length - (width - start)) for length in LENGTHS]
        counts = [max(0, length - (width - stop)) - old for length, old in zip(LENGTHS, before, strict=True)]
        pyramid.append(keys[:, :, start:stop], values[:, :, start:stop], counts)
        plan = Plan.of(schedules, before, counts, columns, 3)
        recent = queries[:, :, max(0, start - kept) : start]
        outs.append(read(queries[:, :, start:stop], pyramid, plan, reading, SCALE, recent=recent))
        start = stop
    out = torch.cat(outs, 2)
    for row, length in enumerate(LENGTHS):
        assert not out[row, :, : width - length].any()
    return [out[row : row + 1, :, width - length :] for row, length in enumerate(LENGTHS)], spy, singles


@pytest.mark.parametrize(
    ("lookahead", "calls"),
    [("none", [64]), ("block", [64]), ("none", [30, 33, 1])],
    ids=["one", "block", "three calls"],
)
def test_padded_rows_equal_single_rows(trial: Trial, calls: list[int]) -> None:
    """P10: rows of one batch, each with its own schedule, give what each gives alone, from the same indices."""
    schedules = [trial.schedule(max(0, length - 4), min(3, length)) for length in LENGTHS]
    outs, spy, singles = padded(trial, schedules, calls)
    together = {} if trial.case.evicts else per_query(spy.chosen)
    for row, (out, schedule, states) in enumerate(zip(outs, schedules, singles, strict=True)):
        if trial.case.evicts:
            torch.testing.assert_close(out, trial.run(states, schedule, dense_until=3), **trial.tolerance)
            continue
        alone, chosen = trial.covers(states, schedule, dense_until=3)
        torch.testing.assert_close(out, alone, **trial.tolerance)
        assert {place: found for (other, place), found in together.items() if other == row} == {
            place: found for (_, place), found in per_query(chosen).items()
        }


def test_rows_padded_on_either_side_without_a_cache(trial: Trial) -> None:
    """P10: a batch over `Pyramid.of`, as in training: keys shifted to the first token, garbage after the last."""
    lengths, offsets, width = [40, 23, 9], [0, 11, 0], 40
    schedules = [trial.schedule(length, 0) for length in lengths]
    singles = [trial.states(length, seed=row) for row, length in enumerate(lengths)]
    queries, keys, values = (torch.full_like(part, torch.nan) for part in trial.states(width, rows=3))
    for row, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
        queries[row, :, offset : offset + length] = singles[row][0][0]
        keys[row, :, :length], values[row, :, :length] = singles[row][1][0], singles[row][2][0]
    plan = Plan.of(schedules, [0] * 3, lengths, width, 3, first=[-offset for offset in offsets])
    out = read(queries, Pyramid.of(keys, values, trial.levels, lengths), plan, trial.reading(), SCALE)
    for row, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
        alone = trial.run(singles[row], schedules[row], dense_until=3)
        torch.testing.assert_close(out[row : row + 1, :, offset : offset + length], alone, **trial.tolerance)
        assert not out[row, :, :offset].any()
        assert not out[row, :, offset + length :].any()


def test_rows_do_not_see_each_other(trial: Trial) -> None:
    """P10: packed texts are rows; changing one leaves the others bit-equal."""
    states = trial.states(40, rows=3)
    changed = [part.clone() for part in states]
    for part in changed:
        part[1] = part[1].flip(1) * 5 + 1
    one, other = trial.run(states), trial.run((changed[0], changed[1], changed[2]))
    assert torch.equal(one[::2], other[::2])
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize("lookahead", ["none"])
def test_a_turn_added_to_rows_that_are_padded_again(trial: Trial) -> None:
    """P10: a second turn whose tokens stand at the right of its columns votes with the queries of the first."""
    schedule, lengths, counts = Schedule.uniform(8), [45, 45], [6, 2]
    states = trial.states(51, rows=2)
    queries, keys, values = states
    pyramid = Pyramid(trial.levels)
    pyramid.append(keys[:, :, :45], values[:, :, :45])
    read(queries[:, :, :45], pyramid, Plan.of([schedule] * 2, [0, 0], lengths, 45, 0), trial.reading(), SCALE)
    second = []
    for part in states:
        new = part[:, :, 45:].clone()
        new[1, :, 4:], new[1, :, :4] = part[1, :, 45:47], torch.nan
        second.append(new)
    pyramid.append(second[1], second[2], counts)
    plan = Plan.of([schedule] * 2, lengths, counts, 6, 0)
    out = read(second[0], pyramid, plan, trial.reading(), SCALE, recent=queries[:, :, 45 - history(schedule) : 45])
    whole = trial.run(states, schedule)
    torch.testing.assert_close(out[0], whole[0, :, 45:], **trial.tolerance)
    torch.testing.assert_close(out[1, :, 4:], whole[1, :, 45:47], **trial.tolerance)


EXTREMES: dict[str, Callable[[Tensor, Tensor, Tensor], States]] = {
    "shifted": lambda q, k, v: (q, k + 1e4 * q[:, :1, :1] / q[:, :1, :1].norm(), v),
    "huge logits": lambda q, k, v: (q * 1e18, k * 1e18, v),
    "huge values": lambda q, k, v: (q, k, v * 1e37),
    "denormal": lambda q, k, v: (q * 1e-40, k * 1e-40, v * 1e-40),
    "rows of -inf": lambda q, k, v: (q.abs() * 1e25 * UNTURNED.to(q), -k.abs() * 1e25 * UNTURNED.to(k), v),
    "zero": lambda q, k, v: (q * 0, k * 0, v * 0),
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_numbers_at_the_ends_of_their_range(trial: Trial, extreme: str) -> None:
    """P11: no NaN comes out; a query whose every logit is -inf reads nothing and gives zeros."""
    for precision in (torch.float32, torch.bfloat16):
        rough = replace(trial, dtype=precision)
        out = rough.run(EXTREMES[extreme](*rough.states(40)), dense_until=5)
        assert not out.isnan().any()
        assert bool(out.any()) == (extreme not in ("rows of -inf", "zero"))


@pytest.mark.parametrize("positions", ["absolute"])
def test_a_shift_of_all_logits_changes_nothing(trial: Trial) -> None:
    """P11: adding 1e4 to every logit leaves the result. (Ranks would turn a common shift of the keys.)"""
    queries, keys, values = trial.states(60)
    queries[..., 0], shifted = 1.0, keys.clone()
    shifted[..., 0] += 1e4 / SCALE
    frozen = Frozen.of(trial, (queries, keys, values))
    one, other = (trial.run((queries, part, values), policy=frozen) for part in (keys, shifted))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rough_types_stay_near_the_oracle(trial: Trial, precision: torch.dtype) -> None:
    """Covers chosen once, read in a rough type and in the oracle's."""
    rough = replace(trial, dtype=precision)
    states = rough.states(60)
    frozen = Frozen.of(rough, states)
    fine = states[0].double(), states[1].double(), states[2].double()
    expected = replace(trial, backend="reference").run(fine, policy=frozen)
    torch.testing.assert_close(rough.run(states, policy=frozen).double(), expected, **rough.tolerance)

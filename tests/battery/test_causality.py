"""P2 and P3: who may decide, and one schedule, one result."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mgam.cover import Cover
from mgam.engine import read
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies import Scored, Voters
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Schedule

from .cases import CASES
from .oracle import blocks_of, borders
from .trial import SCALE, States, Trial

TOKENS = 75


@pytest.fixture
def backend(fast: str) -> str:
    return fast


few_cuts = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
cut_sets = st.sets(st.integers(1, TOKENS - 1), max_size=6)


def other_suffix(states: States, position: int) -> States:
    """The same text up to `position`, another one after it."""
    changed = [part.clone() for part in states]
    for part, other in zip(changed, (3 * part.flip(2) + 1 for part in states), strict=True):
        part[:, :, position:] = other[:, :, position:]
    return changed[0], changed[1], changed[2]


def first_leak(trial: Trial, positions: list[int], **options: object) -> int | None:
    """The first of `positions` before which the output feels a change after it."""
    states = trial.states(TOKENS)
    out = trial.run(states, **options)  # type: ignore[arg-type]
    for position in positions:
        if not torch.equal(trial.run(other_suffix(states, position), **options)[:, :, :position], out[:, :, :position]):  # type: ignore[arg-type]
            return position
    return None


def test_suffix_leaves_earlier_outputs(trial: Trial) -> None:
    """P2: bit-equal at every position with `lookahead=none`, at block borders with `lookahead=block`."""
    places = (
        borders(trial.schedule(), TOKENS, 13)[::3] if trial.lookahead == "block" else [1, 13, 14, 30, 47, 52, 63, 74]
    )
    assert first_leak(trial, places, dense_until=13) is None


@dataclass(frozen=True)
class Peeking(Scored):
    """A policy that breaks its word: queries after the decision have a say."""

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        later = replace(blocks, decide=blocks.stop - 1)
        return super().choose(voters, later, pyramid, levels)


def test_a_peeking_policy_is_caught() -> None:
    """The controls of P2: it sees a policy that looks ahead, and the leak that `lookahead=block` declares."""
    trial = Trial(CASES[0])
    assert first_leak(trial, list(range(20, 60, 3)), policy=Peeking(budget=4, window=1)) is not None
    mgam = next(case for case in CASES if case.name == "mgam")
    inside = [place for place in range(20, 60) if place not in borders(trial.schedule(), TOKENS)]
    assert first_leak(Trial(mgam, lookahead="block"), inside) is not None


Covers = dict[tuple[int, int], tuple[int, list[list[set[int]]]]]


def per_query(chosen: list[tuple[Blocks, Cover]]) -> Covers:
    """(row, position) -> window start and, per level and head, the indices read."""
    found: Covers = {}
    for row, start, stop, _, cover, number in blocks_of(chosen):
        lists = [
            [set(index[number, head].tolist()) - {-1} for head in range(index.shape[1])]
            for index in (cover.opened, *cover.summaries)
        ]
        for position in range(start, stop):
            assert (row, position) not in found
            found[row, position] = int(cover.window_start[number]), lists
    return found


def same(
    trial: Trial, one: tuple[Tensor, list[tuple[Blocks, Cover]]], other: tuple[Tensor, list[tuple[Blocks, Cover]]]
) -> None:
    if trial.dtype not in (torch.float64, torch.float32):
        pytest.skip("half precision: a choice may flip where scores differ by less than it can tell")
    assert per_query(one[1]) == per_query(other[1])
    torch.testing.assert_close(one[0], other[0], **trial.tolerance)


def test_any_cut_into_calls(trial: Trial) -> None:
    """P3: one schedule, any calls, one result. Blocks with lookahead are cut at their borders only."""
    states, dense_until = trial.states(TOKENS), 21
    whole = trial.covers(states, dense_until=dense_until)
    allowed = borders(trial.schedule(), TOKENS, dense_until) if trial.lookahead == "block" else range(TOKENS)

    @few_cuts
    @given(cut_sets)
    def check(cuts: set[int]) -> None:
        cuts = {max(place for place in allowed if place <= cut) for cut in cuts}
        same(trial, trial.covers(states, cuts=sorted(cuts), dense_until=dense_until), whole)

    check()


def test_any_cut_in_single_precision(trial: Trial) -> None:
    """P3 in float32: outputs within 1e-5 and the same indices."""
    single = replace(trial, dtype=torch.float32)
    states = single.states(TOKENS, rows=2)
    cuts = borders(single.schedule(), TOKENS)[2::4] if trial.lookahead == "block" else [1, 27, 51, 62, 63]
    same(single, single.covers(states, cuts=cuts), single.covers(states))


@pytest.mark.parametrize("lookahead", ["none"])
@pytest.mark.parametrize("period", [1, 8, 12])
def test_ties_do_not_flip(trial: Trial, period: int) -> None:
    """P3 where chunks are exactly alike, as in a text that repeats itself: whole numbers, so that sums are exact."""
    queries, keys, values = trial.states(TOKENS)
    repeated = torch.arange(TOKENS, device=keys.device) % period
    states = queries.round(), 2 * keys[:, :, repeated].round(), values
    whole = trial.covers(states)
    for cuts in ([50, 55], [3, 29, 51], range(0, TOKENS, 5)):
        same(trial, trial.covers(states, cuts=cuts), whole)


def test_token_by_token_is_one_pass(trial: Trial) -> None:
    """P3: with blocks of one query, and with blocks that are longer than every call."""
    states = trial.states(40)
    schedules = [Schedule.uniform(1, trial.lookahead)]
    if trial.lookahead == "none":
        schedules.append(Schedule.uniform(8))
    for schedule in schedules:
        same(trial, trial.covers(states, schedule, cuts=range(1, 40)), trial.covers(states, schedule))


@pytest.mark.parametrize("lookahead", ["block"])
def test_a_call_inside_a_block_decides_without_lookahead(trial: Trial) -> None:
    """A block with lookahead that a call cuts in two is decided by what came before it, the others are not touched."""
    states = trial.states(TOKENS)
    edges = [*borders(trial.schedule(), TOKENS), TOKENS]
    cut = 20
    torn = range(max(e for e in edges if e <= cut), min(e for e in edges if e > cut))
    whole, early = (per_query(replace(trial, lookahead=who).covers(states)[1]) for who in ("block", "none"))
    for position, found in per_query(trial.covers(states, cuts=[cut])[1]).items():
        assert found == (early if position[1] in torn else whole)[position]


def test_whole_pyramid_equals_streamed(trial: Trial) -> None:
    """`Pyramid.of` and appended states give one result."""
    states = queries, keys, values = trial.states(TOKENS)
    plan = Plan.of([trial.schedule()], [0], [TOKENS], TOKENS, 0)
    once = read(queries, Pyramid.of(keys, values, trial.levels), plan, trial.reading(), SCALE)
    torch.testing.assert_close(once, trial.run(states), **trial.tolerance)

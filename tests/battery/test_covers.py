"""P4 and P12: what is covered, and how many entries are read, against formulas written apart from the library."""

from __future__ import annotations

import pytest
import torch

from mgam.attend import blockwise
from mgam.pyramid import Pyramid
from mgam.record import Record

from .oracle import blocks_of, covered, reads
from .trial import GROUP, HEADS, SCALE, Trial

TOKENS = 75


@pytest.fixture
def backend() -> str:
    """Covers are chosen before a backend is."""
    return "torch"


def test_coverage_is_as_declared(trial: Trial) -> None:
    """P4: every visible token is in exactly one entry, or in at most one where declared so; none is in the future."""
    _, chosen = trial.covers(trial.states(TOKENS))
    dropped = 0
    for _, start, stop, _, cover, number in blocks_of(chosen):
        for head in range(cover.opened.shape[1]):
            for query in range(start, stop):
                count = covered(reads(cover, number, head, query), TOKENS)
                assert not count[query + 1 :].any()
                assert int(count.max()) == 1
                dropped += int((count[: query + 1] == 0).sum())
    assert bool(dropped) == (not trial.case.partitions)


def test_lists_are_sorted_and_padded(trial: Trial) -> None:
    """Index lists hold no index twice, grow, and end in -1."""
    for _, cover in trial.covers(trial.states(TOKENS))[1]:
        for index in (cover.opened, *cover.summaries):
            for places in index.flatten(0, 1).tolist():
                real = [place for place in places if place >= 0]
                assert places == sorted(set(real)) + [-1] * (len(places) - len(real))


def test_entries_follow_the_formula(trial: Trial) -> None:
    """P12: window, opened chunks and summaries per level are as many as the method says, and are counted right."""
    trial_levels, window = trial.levels, trial.case.with_settings(**trial.changes).window
    policy = trial.reading().policy
    for blocks, cover in trial.covers(trial.states(TOKENS))[1]:
        totals, heads = [0.0] * len(trial_levels.sizes), cover.opened.shape[1]
        for _, start, stop, decide, _, number in blocks_of([(blocks, cover)]):
            begin = trial.case.begins(decide, window) // trial_levels.chunk * trial_levels.chunk
            assert int(cover.window_start[number]) == begin
            for head in range(cover.opened.shape[1]):
                opened = set(cover.opened[number, head].tolist()) - {-1}
                wanted = trial.case.opens(begin // trial_levels.chunk)
                assert len(opened) <= wanted if trial.case.fewer else len(opened) == wanted
                found = [set(index[number, head].tolist()) - {-1} for index in cover.summaries]
                if trial.case.summaries is not None:
                    assert found == trial.case.summaries(trial_levels, begin, opened)
                before = len(opened) * trial_levels.chunk + sum(map(len, found))
                assert int(cover.entries()[number, head]) == before <= policy.read_at_most(begin, trial_levels)
                totals[0] += sum(len(opened) * trial_levels.chunk + query + 1 - begin for query in range(start, stop))
                for level, index in enumerate(found, start=1):
                    totals[level] += len(index) * (stop - start)
        assert cover.entries_per_level(blocks) == pytest.approx([total / heads for total in totals])


def test_only_the_cover_is_read(trial: Trial) -> None:
    """P12: the torch backend gives weight to as many entries as the cover holds, query by query."""
    queries, keys, values = trial.states(TOKENS)
    pyramid, reading = Pyramid.of(keys, values, trial.levels), trial.reading()
    for blocks, cover in trial.covers((queries, keys, values))[1]:
        taken = queries.new_zeros(len(blocks), HEADS * GROUP, blocks.size, queries.shape[3])
        *_, bias = blockwise.gather(taken, blocks, cover, pyramid, reading.positions)
        for _, start, stop, _, _, number in blocks_of([(blocks, cover)]):
            for head in range(cover.opened.shape[1]):
                for query in range(start, stop):
                    weighted = int(torch.isfinite(bias[number, head, query - start]).sum())
                    assert weighted == len(reads(cover, number, head, query))


def test_the_record_adds_up(trial: Trial) -> None:
    """P12: what a reading says it cost is what its covers hold, however the text is cut."""
    states = trial.states(TOKENS)
    whole, cut = Record(), Record()
    _, chosen = trial.covers(states, record=whole)
    trial.run(states, cuts=[50, 61, 62], record=cut)
    assert whole.queries == cut.queries == TOKENS
    assert whole.entries == pytest.approx(cut.entries)
    sums = [cover.entries_per_level(blocks) for blocks, cover in chosen]
    assert whole.entries == pytest.approx([sum(level) for level in zip(*sums, strict=True)])


def test_search_finds_a_planted_chunk(trial: Trial) -> None:
    """A policy that searches opens the chunk whose keys the voters ask for."""
    if not trial.reading().policy.votes:
        pytest.skip("searches nothing")
    queries, keys, values = trial.states(TOKENS)
    keys[:, :, 24] = 40 * queries[:, ::GROUP, 70] / SCALE
    _, chosen = trial.covers((queries, keys, values))
    for _, start, _, _, cover, number in blocks_of(chosen):
        if start == 70:
            asking = GROUP if cover.opened.shape[1] > HEADS else 1
            assert (cover.opened[number, ::asking] == 24 // trial.levels.chunk).any(-1).all()

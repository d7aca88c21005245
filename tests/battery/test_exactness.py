"""P1, P5, P6, P9 and the backends: where multi-granular attention must equal something known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mgam import methods
from mgam.attend import attend
from mgam.pyramid import Pyramid
from mgam.schedule import Lookahead, Schedule, Span

from .cases import CASES
from .oracle import blocks_of, by_hand, dense, reads
from .trial import DIM, GROUP, HEADS, SCALE, Trial

TOKENS = 75


@pytest.fixture
def lookahead() -> Lookahead:
    """Who decided does not matter to what is read from a cover; let all queries of a block, the harder case."""
    return "block"


def test_every_method_has_a_row() -> None:
    assert {case.method for case in CASES} == {name for name in methods.names() if methods.get(name).form == "policy"}


def test_enough_budget_is_dense(trial: Trial) -> None:
    """P1: with a budget or a window that holds everything, dense attention comes out."""
    states = trial.states(TOKENS)
    generous = trial.case.policy(SCALE, **trial.case.generous)
    out = trial.run(states, policy=generous)
    torch.testing.assert_close(out.double().cpu(), dense(*states, SCALE, trial.rotated), **trial.tolerance)


@pytest.mark.parametrize("dense_until", [1, 20, 32, 1000])
def test_queries_before_dense_until_are_dense(trial: Trial, dense_until: int) -> None:
    """P1: positions before `dense_until` read everything, wherever the border falls."""
    states = trial.states(TOKENS)
    out = trial.run(states, dense_until=dense_until)
    expected = dense(*states, SCALE, trial.rotated)
    torch.testing.assert_close(out.double().cpu()[:, :, :dense_until], expected[:, :, :dense_until], **trial.tolerance)
    blocks = [
        p for _, start, stop, *_ in blocks_of(trial.covers(states, dense_until=dense_until)[1]) for p in (start, stop)
    ]
    assert min(blocks, default=TOKENS) == min(dense_until, TOKENS)


UNEQUAL = Schedule((Span(7, 7, "block"), Span(12, 5), Span(30, 4, "block"), Span(36, 6), Span(None, 5, "block")))
"""Blocks of unequal sizes that are computed together."""


def test_unequal_blocks_before_dense_until(trial: Trial) -> None:
    """P1: pieces of unequal size that stand apart in the text, read as one group."""
    states = trial.states(TOKENS, rows=2)
    out = trial.run(states, UNEQUAL, dense_until=33)
    expected = dense(*states, SCALE, trial.rotated)
    torch.testing.assert_close(out.double().cpu()[:, :, :33], expected[:, :, :33], **trial.tolerance)


@pytest.mark.parametrize("schedule", [None, UNEQUAL], ids=["reading", "unequal"])
def test_equals_the_textbook(trial: Trial, schedule: Schedule | None) -> None:
    """Every query's output is one softmax, written by hand, over the entries of its cover."""
    states = trial.states(TOKENS)
    queries, keys, values = states
    out, chosen = trial.covers(states, schedule)
    seen = 0
    for row, start, stop, _, cover, number in blocks_of(chosen):
        for query in {start, stop - 1}:
            for head in range(HEADS * GROUP):
                chooser = head * cover.opened.shape[1] // (HEADS * GROUP)
                entries = reads(cover, number, chooser, query)
                expected = by_hand(
                    queries[row, head, query],
                    keys[row, head // GROUP],
                    values[row, head // GROUP],
                    entries,
                    SCALE,
                    trial.case.mass,
                    trial.rotated,
                )
                torch.testing.assert_close(out[row, head, query].double().cpu(), expected, **trial.tolerance)
        seen += stop - start
    assert seen == TOKENS


def test_constant_values_come_out(trial: Trial) -> None:
    """P5."""
    queries, keys, values = trial.states(TOKENS)
    values = torch.randn(DIM, dtype=torch.float64).to(values).expand_as(values)
    out = trial.run((queries, keys, values))
    torch.testing.assert_close(out, values[:, :1].expand_as(out), **trial.tolerance)


def test_equal_keys_inside_chunks_are_dense(trial: Trial) -> None:
    """P6: where keys, as they are read, are equal inside every chunk, a summary with mass loses nothing.

    Ranks turn the keys of a chunk apart, so for granular positions the keys lie in the dimensions that are not rotated.
    """
    if not (trial.case.partitions and trial.case.mass == 1):
        pytest.skip("declared: drops, or without full mass")
    queries, keys, values = trial.states(TOKENS)
    chunk = torch.arange(TOKENS, device=keys.device) // trial.levels.sizes[-1] * trial.levels.sizes[-1]
    keys = keys[:, :, chunk].clone()
    keys[..., : trial.rotated] = 0
    states = queries, keys, values
    out = trial.run(states)
    torch.testing.assert_close(out.double().cpu(), dense(*states, SCALE), **trial.tolerance)


def test_mass_matters() -> None:
    """The control of P6: without full mass, equal keys are not dense, so P6 can fail."""
    trial = Trial(next(case for case in CASES if case.name == "mgam-half-mass"))
    queries, keys, values = trial.states(TOKENS)
    states = queries, torch.zeros_like(keys), values
    assert not torch.allclose(trial.run(states).double().cpu(), dense(*states, SCALE), atol=1e-3)


def test_grouped_queries_equal_expanded_heads(trial: Trial) -> None:
    """P9: a group of query heads reads as if each had its own copy of the KV head and of its cover."""
    states = queries, keys, values = trial.states(TOKENS)
    reading = trial.reading()
    grouped = Pyramid.of(keys, values, trial.levels)
    single = Pyramid.of(keys.repeat_interleave(GROUP, 1), values.repeat_interleave(GROUP, 1), trial.levels)
    for blocks, cover in trial.covers(states)[1]:
        own = torch.arange(blocks.size) + blocks.start[:, None]
        taken = queries[0][:, own.clamp_max(TOKENS - 1).to(queries.device)].transpose(0, 1).contiguous()
        copies = HEADS * GROUP // cover.opened.shape[1]
        wide = replace(
            cover,
            opened=cover.opened.repeat_interleave(copies, 1),
            summaries=tuple(index.repeat_interleave(copies, 1) for index in cover.summaries),
        )
        live = torch.arange(blocks.size) < blocks.length[:, None]
        results = [
            attend(taken, blocks, read, pyramid, reading.positions, SCALE, backend=trial.backend).transpose(1, 2)[live]
            for read, pyramid in ((cover, grouped), (wide, single))
        ]
        torch.testing.assert_close(*results, **trial.tolerance)


def test_softcap(trial: Trial) -> None:
    """A cap on logits gives what the oracle gives."""
    queries, keys, values = trial.states(TOKENS)
    reading, pyramid = trial.reading(), Pyramid.of(keys, values, trial.levels)
    blocks, cover = trial.covers((queries, keys, values))[1][0]
    own = torch.arange(blocks.size) + blocks.start[:, None]
    taken = queries[0][:, own.clamp_max(TOKENS - 1).to(queries.device)].transpose(0, 1).contiguous()
    live = torch.arange(blocks.size) < blocks.length[:, None]
    results = [
        attend(taken, blocks, cover, pyramid, reading.positions, SCALE, 2.0, backend).transpose(1, 2)[live]
        for backend in (trial.backend, "reference")
    ]
    torch.testing.assert_close(*results, **trial.tolerance)

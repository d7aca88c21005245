"""The engine's records: what is counted, and which chunks answering queries rest on."""

from __future__ import annotations

import pytest
import torch

from battery.cases import CASES
from battery.oracle import blocks_of, reads
from battery.trial import GROUP, HEADS, SCALE, Trial
from mgam import engine
from mgam.engine import Reading, read
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies import Scored
from mgam.policies.compact import Compact, CompactKeys
from mgam.pyramid import Pyramid
from mgam.record import Record
from mgam.schedule import Schedule

TOKENS = 70


@pytest.fixture(params=["mgam", "mgam-drop", "window-coarse"])
def trial(request: pytest.FixtureRequest) -> Trial:
    return Trial(next(case for case in CASES if case.name == request.param))


def weights(trial: Trial, evidence_from: int) -> torch.Tensor:
    """Attention to each chunk of level 1 that a block opened, (H, C), summed over queries and heads, by hand."""
    states = queries, keys, _ = trial.states(TOKENS)
    found = torch.zeros(HEADS, TOKENS // trial.levels.chunk, dtype=torch.float64)
    for _, start, stop, _, cover, number in blocks_of(trial.covers(states)[1]):
        for head in range(HEADS * GROUP) if start >= evidence_from else ():
            opened = cover.opened[number, head // GROUP].tolist()
            for query in range(start, stop):
                entries = reads(cover, number, head // GROUP, query)
                read = torch.stack([keys[0, head // GROUP, first : first + size].mean(0) for first, size in entries])
                mass = torch.tensor([float(size) for _, size in entries], dtype=torch.float64)
                share = torch.softmax(SCALE * read @ queries[0, head, query] + trial.case.mass * mass.log(), 0)
                for (first, size), part in zip(entries, share, strict=True):
                    chunk = first // trial.levels.chunk
                    if size == 1 and chunk in opened:
                        found[head // GROUP, chunk] += part
    return found


@pytest.mark.parametrize("evidence_from", [0, 61, 66])
def test_evidence_is_attention_to_opened_chunks(trial: Trial, evidence_from: int) -> None:
    record = Record(evidence_from=evidence_from)
    trial.run(trial.states(TOKENS), record=record)
    expected = weights(trial, evidence_from)
    (layer,) = record.mass
    got = record.mass[layer]
    torch.testing.assert_close(got, expected[:, : got.shape[1]].float())
    assert not expected[:, got.shape[1] :].any()


def test_evidence_after_the_text_is_none(trial: Trial) -> None:
    record = Record(evidence_from=TOKENS)
    trial.run(trial.states(TOKENS), record=record)
    assert record.mass == {}
    assert record.queries == TOKENS


def test_a_short_text_opens_nothing(trial: Trial) -> None:
    record = Record(evidence_from=0)
    trial.run(trial.states(5), Schedule.uniform(2), record=record)
    assert record.mass == {}
    assert record.entries == [15.0, 0.0, 0.0]


@pytest.mark.parametrize("calls", [[70], [40, 25, 3, 1, 1]])
def test_questions_and_answers_have_a_policy_of_their_own(calls: list[int]) -> None:
    """Wherever calls are cut: the text is read as by the one policy, what follows it as by the other."""
    levels, few, more = Levels((1, 4, 16), 2), Scored(8, 6), Scored(24, 6)
    schedule = Schedule.reading(60, 6, block=8, question_block=3)
    torch.manual_seed(0)
    queries, keys, values = torch.randn(1, 4, 70, 16), torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16)

    def run(reading: Reading) -> torch.Tensor:
        pyramid, found, begin = Pyramid.of(keys[:, :, :0], values[:, :, :0], levels, [0]), [], 0
        for count in calls:
            part = slice(begin, begin + count)
            pyramid.append(keys[:, :, part], values[:, :, part], [count])
            plan = Plan.of([schedule], [begin], [count], count, 0)
            recent = queries[:, :, max(0, begin - 16) : begin]
            found.append(read(queries[:, :, part], pyramid, plan, reading, 0.25, recent=recent))
            begin += count
        return torch.cat(found, 2)

    once, twice = run(Reading(few, levels)), run(Reading(more, levels))
    both = run(Reading(few, levels, asking=more))
    assert torch.equal(both[:, :, :60], once[:, :, :60])
    assert torch.equal(both[:, :, 60:], twice[:, :, 60:])
    assert not torch.allclose(once[:, :, 60:], twice[:, :, 60:])


@pytest.mark.parametrize("tokens", [80, 240])
def test_blocks_before_the_basis_of_compact_keys_are_read_by_themselves(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device the rest's keys are made meanwhile: what is read is the same, and is waited for whatever happens."""
    torch.manual_seed(tokens)
    levels = Levels((1, 8, 32), 4)
    queries, keys, values = (torch.randn(1, heads, tokens, 32) for heads in (4, 2, 2))
    policy = Scored(16, 16, compact=Compact(dims=16, bits=16, calibrate=96))
    plan = Plan.of([Schedule.uniform(16, "block")], [0], [tokens], tokens, 0)
    want = read(queries, Pyramid.of(keys, values, levels), plan, Reading(policy, levels), 32**-0.5)
    monkeypatch.setattr(engine, "serving", lambda *given: "triton")
    monkeypatch.setattr(engine, "_compiled", lambda states: True)
    waited: list[int] = []
    monkeypatch.setattr(CompactKeys, "wait", lambda keys: waited.append(max(keys.chunks)))
    monkeypatch.setattr(
        Scored, "ahead", lambda policy, blocks, pyramid, levels: CompactKeys.ahead(pyramid, levels, policy.compact)
    )
    plan = Plan.of([Schedule.uniform(16, "block")], [0], [tokens], tokens, 0)
    pyramid = Pyramid.of(keys, values, levels)
    got = read(queries, pyramid, plan, Reading(policy, levels), 32**-0.5)
    torch.testing.assert_close(got, want)
    (parts,) = (found for key, found in blocks_known(plan).items() if key[0] == "segments")
    assert [len(part.blocks) for part in parts] == ([5] if tokens == 80 else [6, 9])
    assert waited[-1] == (0 if tokens == 80 else tokens // 8)
    with pytest.raises((RuntimeError, SettingError)):
        read(queries[..., :16], Pyramid.of(keys, values, levels), plan, Reading(policy, levels), 1.0)
    assert waited[-1] == (0 if tokens == 80 else tokens // 8)


def blocks_known(plan: Plan) -> dict:
    """What was worked out of the blocks of a plan of one group."""
    ((_, blocks),) = plan.groups
    return {key: found for key, found in blocks._known["padded"]._known.items() if isinstance(key, tuple)}

"""Methods that forget tokens, against dense attention under the mask that their definition gives."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mgam.engine import Reading, read
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies import Policy, Window
from mgam.policies.eviction import HeavyHitters, Sliding, SnapKV
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule

LEVELS, SCALE, TOKENS = Levels((1, 4), 4), 0.4, 60
PROMPT = Schedule.reading(30, 6, block=8, question_block=3, lookahead="none")


def states(rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(rows, 4, TOKENS, 8), (rows, 2, TOKENS, 8), (rows, 2, TOKENS, 8)]
    a, b, c = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return 2 * a, b, c


def stream(policy: Policy, parts: tuple[Tensor, ...], cuts: list[int], prompt: bool = True) -> tuple[Tensor, Pyramid]:
    queries, keys, values = parts
    reading, pyramid, outs = Reading(policy, LEVELS, dense_prompt=prompt), Pyramid(LEVELS), []
    schedule = PROMPT if prompt else Schedule.uniform(1)
    for start, stop in pairwise([0, *cuts, TOKENS]):
        pyramid.append(keys[:, :, start:stop], values[:, :, start:stop])
        rows = len(queries)
        plan = Plan.of([schedule] * rows, [start] * rows, [stop - start] * rows, stop - start, 0, dense_prompt=prompt)
        outs.append(read(queries[:, :, start:stop], pyramid, plan, reading, SCALE))
    return torch.cat(outs, 2), pyramid


def masked(parts: tuple[Tensor, ...], seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and its weights where `seen` (Hkv, T, T) says what is read."""
    queries, keys, values = parts
    k, v = (part.repeat_interleave(2, 1) for part in (keys, values))
    logits = (SCALE * queries @ k.transpose(-1, -2)).masked_fill(~seen.repeat_interleave(2, 0), -torch.inf)
    weights = torch.softmax(logits, -1)
    return weights @ v, weights


def causal() -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, -1, -1).clone()


CUTS = [[], [36], [17, 33, 36, 37], [*range(36, TOKENS)]]


@pytest.mark.parametrize("cuts", CUTS, ids=len)
def test_snapkv_keeps_what_the_end_of_the_prompt_attends_to(cuts: list[int]) -> None:
    parts, end = states(), 36
    policy = SnapKV(capacity=14, look=7, recent=3, sink=2, smooth=5, scale=SCALE)
    weights = masked(parts, causal())[1][0, :, end - 7 : end, :end].unflatten(0, (2, 2)).mean(1).sum(1)
    seen = causal()
    for head in range(2):
        padded = torch.nn.functional.pad(weights[head], (2, 2))
        smooth = torch.stack([padded[place : place + 5].mean() for place in range(end)])
        kept = {0, 1, end - 1, end - 2, end - 3}
        for place in smooth.argsort(descending=True).tolist():
            kept |= {place} if len(kept) < 14 else set()
        gone = sorted(set(range(end)) - kept)
        seen[head, end:, gone] = False
    out, pyramid = stream(policy, parts, cuts)
    torch.testing.assert_close(out, masked(parts, seen)[0], atol=1e-9, rtol=0)
    assert pyramid.held == [14 + TOKENS - end]
    assert pyramid.lengths == [TOKENS]


@pytest.mark.parametrize("heavy", [5, 0])
@pytest.mark.parametrize("cuts", CUTS, ids=len)
def test_h2o_is_its_simulation_token_by_token(cuts: list[int], heavy: int) -> None:
    parts, end, recent = states(), 36, 6
    seen = causal()
    sums = masked(parts, seen)[1][0, :, :end].sum(1).unflatten(0, (2, 2)).sum(1)
    alive = [set(range(end)), set(range(end))]
    for token in range(end, TOKENS):
        for head in range(2):
            old = [place for place in alive[head] if place < token - recent]
            best = sorted(old, key=lambda place, head=head: -float(sums[head, place]))[:heavy]
            alive[head] = set(best) | {place for place in alive[head] if place >= token - recent} | {token}
            seen[head, token] = False
            seen[head, token, sorted(alive[head])] = True
        sums = sums + masked(parts, seen)[1][0, :, token].unflatten(0, (2, 2)).sum(1)
    out, pyramid = stream(HeavyHitters(heavy, recent, SCALE), parts, cuts)
    torch.testing.assert_close(out, masked(parts, seen)[0], atol=1e-9, rtol=0)
    assert pyramid.held[0] <= heavy + recent + max([TOKENS - end, *map(int, torch.tensor([0, *cuts]).diff())][:1])


@pytest.mark.parametrize("cuts", [[20, 21, 40], [*range(1, TOKENS)]], ids=len)
def test_streaming_reads_the_same_and_keeps_little(cuts: list[int]) -> None:
    parts = states()
    out, pyramid = stream(Sliding(9, spare=4), parts, cuts, prompt=False)
    expected, whole = stream(Window(9), parts, cuts, prompt=False)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert whole.held == [TOKENS]
    if len(cuts) > 3:
        assert pyramid.held[0] <= 4 + 9 + 4 + 4 + 8
        assert pyramid.keys[0].shape[2] < 320


def test_evicted_caches_move_and_refuse_to_go_back() -> None:
    parts = states(rows=2)
    policy = SnapKV(capacity=14, look=7, recent=3, sink=2, smooth=5)
    _, pyramid = stream(policy, parts, [40])
    held = pyramid.held[1]
    first = pyramid.keys[0][1, :, :held].clone()
    pyramid.select(torch.tensor([1, 0]))
    assert pyramid.held[0] == held
    assert torch.equal(pyramid.keys[0][0, :, :held], first)
    pyramid.crop([4, 4])
    assert pyramid.lengths == [TOKENS - 4] * 2
    with pytest.raises(SettingError, match="evicted"):
        pyramid.crop([30, 30])
    _, pyramid = stream(HeavyHitters(5, 6, SCALE), parts, [])
    with pytest.raises(SettingError, match="cropped"):
        pyramid.crop([1, 1])


def test_memory_is_freed() -> None:
    parts = states()
    _, kept = stream(SnapKV(capacity=14, look=7, recent=3, sink=2, smooth=5), parts, [36])
    long = Pyramid(LEVELS)
    long.reserve(4096)
    long.append(parts[1], parts[2])
    assert long.keys[0].shape[2] >= 4096
    long.keep([torch.arange(14).expand(2, -1)], [TOKENS])
    assert long.keys[0].shape[2] <= 256
    assert kept.held[0] == 14 + TOKENS - 36


def test_out_of_range() -> None:
    with pytest.raises(SettingError, match="budget=3"):
        SnapKV(capacity=3, recent=2, sink=2)


def test_h2o_rows_of_a_batch_forget_as_they_do_alone() -> None:
    """Rows that hold as much after a call, but held less or more before it, beside one that forgets."""
    rows = [states(seed=seed) for seed in range(3)]
    calls = [(4, 5, 14), (3, 2, 3), (6, 6, 2)]

    def run(chosen: list[int]) -> list[Tensor]:
        policy = HeavyHitters(8, 2, SCALE)
        reading, pyramid, outs = Reading(policy, LEVELS, dense_prompt=False), Pyramid(LEVELS), []
        before = [0] * len(chosen)
        for call in calls:
            counts = [call[row] for row in chosen]
            most = max(counts)
            spans = [slice(old, old + new) for old, new in zip(before, counts, strict=True)]
            columns = [
                torch.cat([torch.nn.functional.pad(rows[row][part][:, :, span], (0, 0, most - count, 0))
                           for row, span, count in zip(chosen, spans, counts, strict=True)])
                for part in range(3)
            ]  # fmt: skip
            pyramid.append(columns[1], columns[2], counts)
            plan = Plan.of([Schedule.uniform(1)] * len(chosen), before, counts, most, 0)
            out = read(columns[0], pyramid, plan, reading, SCALE)
            outs.append([out[number, :, most - count :] for number, count in enumerate(counts)])
            before = [old + new for old, new in zip(before, counts, strict=True)]
        return [torch.cat(parts, 1) for parts in zip(*outs, strict=True)]

    together = run([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(together[row], run([row])[0], atol=1e-9, rtol=0)

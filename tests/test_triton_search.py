"""The search kernels against the search of `Scored` in float64, and their covers against `cover_of`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mgam import kernels
from mgam.cover import cover_of, window_start
from mgam.levels import Levels
from mgam.policies import Scored, Voters
from mgam.policies.asked import flat, plain_scores
from mgam.policies.compact import Compact, CompactKeys
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Schedule
from triton_cases import DEVICE, needs_triton

pytestmark = needs_triton

KEPT = torch.bfloat16 if DEVICE == "cuda" else torch.float32
"""Search keys' precision; Triton's interpreter cannot multiply bfloat16."""


def made(tokens: int, votes: int, dim: int, lookahead: str, group: int = 2, batch: int = 2):
    """A pyramid whose unread places are NaN, voters, and the same in float64."""
    torch.manual_seed(tokens + votes + dim)
    levels = Levels((1, 8, 32), 4)
    keys = torch.randn(batch, 2, tokens, dim)
    pyramid = Pyramid.of(keys, keys, levels)
    pieces = [(row, p) for row in range(batch) for p in Schedule.uniform(votes, lookahead).pieces(0, tokens)]
    blocks = Blocks.of(pieces)
    queries = 2 * torch.randn(len(blocks), 2 * group, blocks.votes, dim)
    live = torch.arange(blocks.votes) < (blocks.vote_to - blocks.vote_from)[:, None]
    return levels, pyramid, blocks, Voters(queries, live)


@pytest.mark.parametrize(
    ("tokens", "votes", "dim", "lookahead", "batch"),
    [
        (300, 16, 64, "none", 2), (203, 40, 48, "block", 2), (160, 1, 64, "none", 2), (70, 20, 128, "block", 2),
        (330, 4, 64, "block", 1), (203, 12, 48, "block", 1), (150, 1, 64, "none", 1),
    ],
)  # fmt: skip
def test_scores_equal_oracle(tokens: int, votes: int, dim: int, lookahead: str, batch: int) -> None:
    """Also where blocks of one row share a tile: those with few voters, the last tile not full."""
    from mgam.policies import search_triton

    levels, pyramid, blocks, voters = made(tokens, votes, dim, lookahead, batch=batch)
    assert pyramid.search is not None
    pyramid.search = pyramid.search.to(KEPT).double()
    chunks = int(blocks.decide.max()) // levels.chunk
    want = Scored().scores(Voters(voters.queries.to(KEPT).double(), voters.live), blocks, pyramid, levels)
    search = pyramid.search.to(DEVICE, KEPT)
    asked = flat(
        voters.queries.to(DEVICE), voters.live.to(DEVICE), search, blocks.row.to(DEVICE),
        (blocks.decide // levels.chunk).to(DEVICE), dim**-0.5,
    )  # fmt: skip
    got = search_triton.scores(asked, chunks)
    assert torch.allclose(got.cpu().double(), want.double(), atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(("votes", "batch"), [(4, 1), (40, 2)])
def test_scores_are_written_where_they_stand(votes: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that search full keys and blocks that search compact ones fill one table."""
    levels, pyramid, blocks, voters = made(120, votes, 32, "block", batch=batch)
    assert pyramid.search is not None
    # Half of the dimensions hold nearly all, and no score towers: which are kept is no matter of half precision.
    spread = torch.ones(32).index_fill_(0, torch.arange(1, 32, 2), 0.05)
    pyramid.search, voters = (pyramid.search * spread).to(KEPT), replace(voters, queries=voters.queries / 4)
    policy = Scored(compact=Compact(dims=16, bits=16, calibrate=64))
    want = policy.scores(voters, blocks, pyramid, levels)
    pyramid.search, pyramid.derived = pyramid.search.to(DEVICE), {}
    pyramid.keys = [level.to(DEVICE) for level in pyramid.keys]
    monkeypatch.setattr(kernels, "serve", lambda states: True)
    there = Voters(voters.queries.to(DEVICE), voters.live.to(DEVICE))
    got = policy.scores(there, blocks, pyramid, levels)
    assert got.shape == want.shape
    close = {"atol": 2e-3, "rtol": 2e-2} if DEVICE == "cpu" else {"atol": 5e-2, "rtol": 1e-1}
    assert torch.allclose(got.cpu(), want.float(), **close)


@pytest.mark.parametrize("bits", [8, 16])
def test_compact_scores(bits: int) -> None:
    """Compact keys: the kernel equals the plain computation on the same rounded numbers, and stays near the full
    search."""
    from mgam.policies import search_triton

    levels, pyramid, blocks, voters = made(256, 32, 64, "block")
    assert pyramid.search is not None
    pyramid.search = pyramid.search.to(KEPT)
    compact = Compact(dims=32, bits=bits, calibrate=64)
    short = CompactKeys.of(pyramid, levels, compact)
    chunks = int(blocks.decide.max()) // levels.chunk
    visible = blocks.decide // levels.chunk
    asked = short.asked(voters.queries, voters.live, blocks.row, visible, 64**-0.5)
    want = plain_scores(asked, chunks).double()
    states = {name: value for name, value in vars(asked).items() if isinstance(value, torch.Tensor)}
    there = replace(asked, **{name: value.to(DEVICE) for name, value in states.items()})
    got = search_triton.scores(there, chunks).cpu().double()
    assert torch.allclose(got, want, atol=2e-3, rtol=2e-3)
    if bits == 16:
        full = replace(Scored(), compact=replace(compact, dims=64)).scores(voters, blocks, pyramid, levels)
        exact = Scored().scores(voters, blocks, pyramid, levels)
        loose = 2e-3 if torch.float32 == KEPT else 5e-2
        assert torch.allclose(full, exact.to(full.dtype), atol=loose, rtol=loose)


def test_projection_equals_plain() -> None:
    """Queries and keys that a kernel shortens are those that the plain way shortens, up to rounding."""
    from mgam.policies.search_triton import shorten_keys, shorten_queries

    levels, pyramid, blocks, voters = made(256, 20, 64, "block")
    assert pyramid.search is not None
    pyramid.search = pyramid.search.to(KEPT) + 1
    plain = CompactKeys.of(pyramid, levels, Compact(dims=32, bits=8, calibrate=64))
    full = slice(0, 256 // 8)
    keys = shorten_keys(
        pyramid.search[:, :, :, full].to(DEVICE), plain.basis.to(DEVICE), plain.offset.to(DEVICE), plain.step.to(DEVICE)
    )
    # Eight bits round to nearest on the device; the interpreter cuts them off.
    loose = 8e-2 if DEVICE == "cpu" else 4e-2
    error = (keys.cpu().float() - plain.search[:, :, :, full].float()).norm() / plain.search[
        :, :, :, full
    ].float().norm()
    assert error < loose
    queries = voters.queries.to(KEPT)
    want, factor = plain.ask(queries.reshape(len(blocks), 2, -1, 64), blocks.row)
    basis, step = plain.basis.to(DEVICE), plain.step.to(DEVICE)
    got, scaled = shorten_queries(queries.to(DEVICE), blocks.row.to(DEVICE), basis, step, 2.0)
    exact = want.float() * factor[..., None]
    error = (got.cpu().float() * scaled.cpu()[..., None] / 2 - exact).norm() / exact.norm()
    assert error < loose


@pytest.mark.parametrize("short", [False, True])
def test_few_voters_choose_alike(short: bool) -> None:
    """One launch from logits to cover opens what scores and then a cover open; voters are shortened alike."""
    from mgam.policies import search_triton

    levels, pyramid, blocks, voters = made(300, 1, 64, "none", group=4)
    assert pyramid.search is not None
    blocks, voters = blocks[-6:], Voters(voters.queries[-6:], voters.live[-6:])
    search = pyramid.search.to(DEVICE, KEPT)
    queries, live, row = voters.queries.to(DEVICE, KEPT), voters.live.to(DEVICE), blocks.row.to(DEVICE)
    start = window_start(blocks.decide, 16, levels).to(DEVICE)
    visible = (blocks.decide // levels.chunk).to(DEVICE)
    chunks = int(visible.max())
    asked = flat(queries, live, search, row, visible, 0.125)
    if short:
        basis = torch.linalg.qr(torch.randn(2, 2, 64, 32, device=DEVICE)).Q.contiguous()
        step = torch.full((2, 2), 3.0 / 224, device=DEVICE)
        keys = search_triton.shorten_keys(search, basis, torch.zeros(2, 2, basis.shape[-1], device=DEVICE), step)
        turned, factor = search_triton.shorten_queries(queries, row, basis, step, 0.18)
        asked = replace(asked, queries=turned, factor=factor, search=keys)
    want = search_triton.cover(search_triton.scores(asked, chunks), start, levels, 3)
    if short:
        whole = queries.reshape(len(blocks), 2, 4, 64)
        asked = replace(asked, queries=whole, factor=step, basis=basis, step=step, scale=0.18)
    got = search_triton.cover_of(asked, chunks, start, levels, 3)
    same = (got.opened == want.opened).all(-1).float().mean()
    assert same == 1.0 if DEVICE == "cpu" else same > 0.98  # a tie of rounded scores may fall either way


@pytest.mark.parametrize("sizes", [(1, 8), (1, 8, 32), (1, 4, 8, 32)])
@pytest.mark.parametrize(("tokens", "best"), [(7, 3), (60, 3), (330, 3), (4200, 900)])
def test_covers_equal(sizes: tuple[int, ...], tokens: int, best: int) -> None:
    """With many chunks and levels, entries are counted in numbers of 64 bits."""
    from mgam.policies import search_triton

    levels = Levels(sizes, 4)
    blocks = Blocks.of([(0, piece) for piece in Schedule.uniform(24).pieces(0, tokens)])[-14:]
    start = window_start(blocks.decide, 20, levels)
    chunks = int(start.max()) // levels.chunk
    torch.manual_seed(tokens)
    found = torch.rand(len(blocks), 2, chunks)
    number = torch.arange(chunks)
    allowed = (number > 0) & ((number + 1) * levels.chunk <= start[:, None])
    mask = torch.zeros(len(blocks), 2, chunks, dtype=torch.bool)
    if chunks > 1:
        first = found.masked_fill(~allowed[:, None], -1).topk(min(best, chunks - 1), -1).indices
        mask.scatter_(-1, first, True)
    want = cover_of(mask & allowed[:, None], start, levels)
    got = search_triton.cover(found.to(DEVICE), start.to(DEVICE), levels, best)
    for ours, theirs in zip((got.opened, *got.summaries), (want.opened, *want.summaries), strict=True):
        ours = ours.cpu()
        width = theirs.shape[-1]
        assert torch.equal(ours[..., :width], theirs[..., : ours.shape[-1]])
        assert not (ours[..., width:] >= 0).any()
    assert got.placed is not None or not chunks or chunks == 1
    if got.placed is not None:
        counts, ranks = got.placed
        lists = (want.opened, *want.summaries)
        held = torch.stack([(part >= 0).sum(-1) for part in lists], -1)
        assert torch.equal(counts.cpu().long(), held)
        first, others = want.ranks()
        for ours, theirs, part in zip(ranks, (first, *others), lists, strict=True):
            width = min(ours.shape[-1], part.shape[-1])
            there = part[..., :width] >= 0
            assert torch.equal(ours.cpu()[..., :width][there], theirs[..., :width][there])


@pytest.mark.parametrize("most", [1, 5, 31, 63, 64])
def test_best_chunks(most: int) -> None:
    """The highest scores are opened, of equal ones the earliest, whatever their bits."""
    from mgam.policies import search_triton

    torch.manual_seed(most)
    levels, chunks = Levels((1, 8, 32), 4), 65
    found = torch.stack((
        torch.rand(chunks) ** 30, torch.rand(chunks), torch.zeros(chunks), torch.randint(0, 4, (chunks,)).float(),
        2.0 ** torch.randint(-40, 40, (chunks,)).float(), 1 + torch.rand(chunks) / 1e6,
    ))[None]  # fmt: skip
    start = torch.tensor([chunks * levels.chunk])
    got = search_triton.cover(found.to(DEVICE), start.to(DEVICE), levels, most).opened.cpu()
    for row, ours in zip(found[0], got[0], strict=True):
        order = sorted(range(1, chunks), key=lambda chunk: (-float(row[chunk]), chunk))
        assert ours[ours >= 0].tolist() == sorted([0, *order[:most]])


@pytest.mark.parametrize("chunks", [1, 2, 3, 17, 64, 100, 250])
@pytest.mark.parametrize("window", ["start", "middle", "end"])
def test_best_of_any_width(chunks: int, window: str) -> None:
    """Whatever the width, how far the window lets it look, and how far scores lie from the highest: also where they are
    too low for a first look, where the bar lies in the lowest bit, and where they all tie."""
    from mgam.policies import search_triton

    torch.manual_seed(chunks)
    levels = Levels((1, 8, 32), 4)
    low = torch.rand(chunks) * 2.0**-60
    found = torch.stack((
        torch.rand(chunks), low.index_fill(0, torch.tensor([chunks // 2]), 1.0), torch.full((chunks,), 0.25),
        torch.zeros(chunks), 2.0 ** -torch.arange(chunks).float(), 1 + torch.randint(0, 3, (chunks,)) * 2.0**-23,
        torch.randint(0, 2, (chunks,)).float() * 16,
    ))[None]  # fmt: skip
    stop = {"start": 0, "middle": chunks // 2, "end": chunks}[window]
    start = torch.tensor([stop * levels.chunk])
    for most in (1, 2, 16, 99):
        got = search_triton.cover(found.to(DEVICE), start.to(DEVICE), levels, most)
        for row, ours in zip(found[0], got.opened[0].cpu(), strict=True):
            order = sorted(range(1, stop), key=lambda chunk: (-float(row[chunk]), chunk))
            assert ours[ours >= 0].tolist() == sorted(([0] if stop else []) + order[:most])


@pytest.mark.parametrize("peak", [0.0, 224.0])
@pytest.mark.parametrize("case", ["decaying", "few of them", "one direction", "one key", "far from zero"])
def test_calibration(case: str, peak: float) -> None:
    """An orthonormal basis of the leading directions of keys less their mean, and what goes with it, for each row and
    head, of keys that lie apart in memory; whatever the rank of the keys, and however far they lie from zero."""
    from mgam.policies.basis_triton import calibrate, serves

    torch.manual_seed(3)
    dim, width, count, places = 64, 16, {"few of them": 3, "one key": 1}.get(case, 20), 1 if case == "one key" else 4
    assert serves(dim, width)
    weight = torch.eye(dim)[0] if case == "one direction" else 0.85 ** torch.arange(float(dim))
    turned = torch.linalg.qr(torch.randn(2, 3, dim, dim)).Q
    keys = torch.randn(2, 3, places, count, dim) * weight @ turned[:, :, None]
    keys += torch.randn(2, 3, 1, 1, dim) * (100 if case == "far from zero" else 1)
    keys = keys.to(KEPT)
    room = torch.full((2, 3, places, count + 2, dim), torch.nan, dtype=KEPT)
    room[:, :, :, :count] = keys
    shapes = (2, 3, dim, width), (2, 3, dim), (2, 3, width), (2, 3)
    made = [torch.empty(shape, device=DEVICE) for shape in shapes]
    half = torch.empty(shapes[0], device=DEVICE, dtype=torch.bfloat16)
    calibrate(room.to(DEVICE)[:, :, :, :count], *made, half, peak)
    assert (half.float() - made[0]).abs().max() < 2.0**-7
    basis, mean, offset, step = (part.double().cpu() for part in made)
    flat = keys.double().flatten(2, 3)
    centred = flat - flat.mean(2, keepdim=True)
    torch.testing.assert_close(mean, flat.mean(2), atol=1e-4, rtol=1e-5)
    assert (basis.mT @ basis - torch.eye(width)).abs().max() < 1e-4
    torch.testing.assert_close(offset, (mean[:, :, None] @ basis)[:, :, 0], atol=2e-3, rtol=1e-4)
    most = (centred @ basis).abs().amax((2, 3)).clamp_min(1e-20) / (peak or 1)
    torch.testing.assert_close(step, most if peak else torch.ones(2, 3).double(), atol=1e-7, rtol=5e-3)
    moments = centred.mT @ centred
    within = (basis.mT @ moments @ basis).diagonal(dim1=2, dim2=3).sum(-1)
    best = torch.linalg.eigvalsh(moments)[..., -width:].sum(-1)
    assert (within >= 0.98 * best - 1e-6).all()


def test_calibration_is_of_the_shapes_that_it_serves() -> None:
    from mgam.policies.basis_triton import serves

    shapes = {(128, 64): True, (96, 48): False, (128, 128): False, (64, 8): False, (128, 48): False}
    assert {shape: serves(*shape) for shape in shapes} == shapes

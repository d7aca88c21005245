"""The read kernel against the oracle in float64, on fresh random data, in buffers poisoned with NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from mgam.cover import Known
from triton_cases import DEVICE, DTYPES, Case, in_float64, needs_triton, oracle, poisoned

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(hash(request.node.name) % (1 << 31))


CASES = {
    "plain": Case(),
    "levels": Case(sizes=(1, 8, 32), window=12, tokens=117, opened=2),
    "four levels": Case(sizes=(1, 4, 8, 32), search=4, tokens=101, opened=3),
    "ragged": Case(batch=3, lengths=(107, 64, 9), tokens=107, sizes=(1, 8, 32), opened=2),
    "granular": Case(granular=True, sizes=(1, 8, 32), window=12, tokens=117, opened=2),
    "granular, partial rotation": Case(granular=True, pairs=16, sizes=(1, 8, 32), tokens=99, opened=2),
    "head 96": Case(dim=96, granular=True, tokens=70, opened=2),
    "softcap": Case(softcap=5.0, tokens=90),
    "no mass": Case(mass=False, tokens=90),
    "drop": Case(rest="drop", tokens=150),
    "one query": Case(block=1, tokens=77, few=9),
    "one query, granular": Case(block=1, tokens=77, few=9, granular=True),
    "single token": Case(tokens=1),
    "shorter than a chunk": Case(tokens=5),
    "no group": Case(group=1, tokens=100),
    "odd group": Case(group=7, tokens=60, block=8),
    "big chunk": Case(sizes=(1, 64, 128), search=4, tokens=300, opened=2, window=64, block=16, heads=1),
    "granular, big chunk": Case(
        sizes=(1, 64, 128), search=4, tokens=300, opened=2, window=64, block=16, heads=1, granular=True
    ),
    "dense": Case(dense=True, tokens=100),
    "dense, granular": Case(dense=True, tokens=100, granular=True),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_oracle(name: str) -> None:
    from mgam.attend.triton.forward import read
    from mgam.attend.triton.lists import Lists
    from mgam.attend.triton.tables import Turn

    case = CASES[name]
    for dtype in DTYPES:
        made = case.make(dtype)
        want = oracle(made)
        lists = Lists.of(made.cover, made.blocks, made.queries.device, made.positions)
        turn = Turn.of(made.positions, lists, made.pyramid.tokens, made.queries.device, made.queries.dtype)
        got = read(
            made.queries, lists, made.pyramid.keys, made.pyramid.values, made.scale, turn=turn, softcap=case.softcap
        )
        made.compare(got.out, want.out)
        live = torch.isfinite(want.lse)
        assert torch.equal(live, torch.isfinite(got.lse.cpu()))
        assert (got.lse.cpu().double() - want.lse)[live].abs().max() < made.tolerance


@pytest.mark.parametrize(
    "name",
    ["levels", "ragged", "granular", "granular, partial rotation", "softcap", "one query, granular", "big chunk"],
)
def test_masses_of_opened_chunks(name: str) -> None:
    from mgam.attend import blockwise
    from mgam.attend.triton.forward import read
    from mgam.attend.triton.lists import Lists
    from mgam.attend.triton.masses import masses
    from mgam.attend.triton.tables import Turn

    made = CASES[name].make(DTYPES[-1])
    wide = in_float64(made)
    for states in (*wide.pyramid.keys, *wide.pyramid.values):
        states.nan_to_num_(0.0)
    want = blockwise.masses(
        wide.queries, wide.blocks, wide.cover, wide.pyramid, wide.positions, wide.scale, wide.softcap
    )
    lists = Lists.of(made.cover, made.blocks, made.queries.device, made.positions)
    turn = Turn.of(made.positions, lists, made.pyramid.tokens, made.queries.device, made.queries.dtype)
    keys, values = made.pyramid.keys, made.pyramid.values
    lse = read(made.queries, lists, keys, values, made.scale, turn=turn, softcap=made.softcap).lse
    got = masses(made.queries, lists, keys[0], lse, made.scale, turn=turn, softcap=made.softcap).cpu().double()
    assert want.any()
    assert (got - want).norm() / want.norm() < made.tolerance


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("name", ["levels", "ragged", "one query, granular", "single token", "big chunk"])
def test_split_equals_oracle(name: str, splits: int) -> None:
    from mgam.attend.triton.forward import Tiles, read
    from mgam.attend.triton.lists import Lists
    from mgam.attend.triton.tables import Turn

    made = CASES[name].make(DTYPES[-1])
    want = oracle(made)
    lists = Lists.of(made.cover, made.blocks, made.queries.device, made.positions)
    turn = Turn.of(made.positions, lists, made.pyramid.tokens, made.queries.device, made.queries.dtype)
    got = read(
        made.queries,
        lists,
        made.pyramid.keys,
        made.pyramid.values,
        made.scale,
        turn=turn,
        tiles=Tiles(16, 16, 4, 2, splits),
    )
    made.compare(got.out, want.out)


@pytest.mark.parametrize("splits", [2, 5, 8])
@pytest.mark.parametrize("name", ["one query", "one query, granular", "odd group", "head 96"])
def test_parts_that_the_last_program_merges(name: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal the oracle, with all parts at once and a few at a time; counted from zeros, each call alike."""
    from mgam.attend.triton import forward
    from mgam.attend.triton.lists import Lists
    from mgam.attend.triton.tables import Turn

    made = replace(CASES[name], block=1, few=6).make(DTYPES[-1])
    want = oracle(made)
    lists = Lists.of(made.cover, made.blocks, made.queries.device, made.positions)
    turn = Turn.of(made.positions, lists, made.pyramid.tokens, made.queries.device, made.queries.dtype)
    call = made.queries, lists, made.pyramid.keys, made.pyramid.values, made.scale
    for few in (False, True):
        if few:
            monkeypatch.setattr(forward, "_together", lambda *_: 2)
        tickets = torch.zeros(*lists.counts.shape[:2], dtype=torch.int32, device=DEVICE)
        tiles = forward.Tiles(16, 16, 4, 2, splits)
        got = forward.read(*call, turn=turn, tiles=tiles, tickets=tickets)
        assert (tickets == splits).all()
        made.compare(got.out, want.out)
        live = torch.isfinite(want.lse)
        assert (got.lse.cpu().double() - want.lse)[live].abs().max() < made.tolerance
        again = forward.read(*call, turn=turn, tiles=tiles, tickets=torch.zeros_like(tickets))
        assert torch.equal(again.out, got.out)
        assert torch.equal(again.lse, got.lse)


WHOLE = {
    "absolute": Case(tokens=320, sizes=(1, 32, 64), block=32, window=40, opened=3),
    "granular": Case(tokens=320, sizes=(1, 32, 64), block=32, window=40, opened=3, granular=True),
    "granular, three levels": Case(
        tokens=512, sizes=(1, 16, 64, 256), block=32, window=20, opened=2, granular=True, heads=1, few=6
    ),
    "granular, big chunk": Case(tokens=512, sizes=(1, 64, 128), block=64, window=64, opened=2, granular=True, heads=1),
    "rows": Case(batch=2, tokens=192, sizes=(1, 32, 64), block=32, window=32, opened=2, granular=True, group=3),
    "softcap, no mass": Case(tokens=192, sizes=(1, 32), block=32, window=32, softcap=5.0, mass=False),
    "drop": Case(tokens=192, sizes=(1, 32), block=32, window=32, rest="drop", granular=True),
    "dense": Case(dense=True, tokens=192, block=32, granular=True),
}


@pytest.mark.parametrize("room", [1 << 29, 1])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_tiles_equal_oracle(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill by whole tiles, with all covers at once and with one cover at a time."""
    from mgam.attend.triton import prefill
    from mgam.attend.triton.forward import read
    from mgam.attend.triton.lists import Lists
    from mgam.attend.triton.prefill import WholeTiles, fits
    from mgam.attend.triton.tables import Turn

    monkeypatch.setattr(prefill, "FAR_BYTES", room)
    for dtype in DTYPES:
        made = WHOLE[name].make(dtype)
        want = oracle(made)
        cover = replace(made.cover, known=Known(made.cover.window_start.cpu(), 0))
        lists = Lists.of(cover, made.blocks, made.queries.device, made.positions)
        turn = Turn.of(made.positions, lists, made.pyramid.tokens, made.queries.device, made.queries.dtype)
        states = made.pyramid.keys, made.pyramid.values
        tiles = WholeTiles(32, 16)
        assert fits(made.queries, lists, *states, turn, tiles)
        out = torch.full_like(made.queries, torch.nan)
        got = read(made.queries, lists, *states, made.scale, turn=turn, softcap=made.softcap, tiles=tiles, out=out)
        made.compare(got.out, want.out)
        assert (got.lse.cpu().double() - want.lse).abs().max() < made.tolerance


def test_what_is_not_whole_is_read_otherwise() -> None:
    """Ragged rows, odd lengths and covers nobody vouches for do not fit."""
    from mgam.attend.triton.lists import Lists
    from mgam.attend.triton.prefill import WholeTiles, fits
    from mgam.attend.triton.tables import Turn

    cases = {
        "known": (WHOLE["granular"], True), "unknown": (WHOLE["granular"], False),
        "odd": (replace(WHOLE["granular"], tokens=319), True), "small chunk": (CASES["levels"], True),
        "part of a head": (replace(WHOLE["granular"], pairs=16), True),
    }  # fmt: skip
    for name, (case, known) in cases.items():
        made = case.make(DTYPES[0])
        told = Known(made.cover.window_start.cpu(), 0) if known else None
        lists = Lists.of(replace(made.cover, known=told), made.blocks, made.queries.device, made.positions)
        turn = Turn.of(made.positions, lists, made.pyramid.tokens, made.queries.device, made.queries.dtype)
        whole = fits(made.queries, lists, made.pyramid.keys, made.pyramid.values, turn, WholeTiles(32, 16))
        assert whole == (name == "known"), name


def test_strided_states() -> None:
    """Keys in a larger buffer, heads innermost: nothing is copied, nothing beyond the row is used."""
    from mgam.attend import attend

    made = CASES["levels"].make(DTYPES[-1])
    want = oracle(made)
    made.pyramid.keys[0] = poisoned(made.pyramid.keys[0].transpose(1, 2), 11).transpose(1, 2)
    made.pyramid.values[0] = poisoned(made.pyramid.values[0].transpose(1, 2), 5).transpose(1, 2)
    queries = made.queries.transpose(1, 2).contiguous().transpose(1, 2)
    got = attend(queries, made.blocks, made.cover, made.pyramid, made.positions, made.scale, backend="triton")
    made.compare(got, want.out)


@pytest.mark.parametrize("name", ["ragged", "one query, granular"])
def test_each_query_head_may_read_its_own_cover(name: str) -> None:
    from mgam.attend import attend

    made = CASES[name].make(DTYPES[-1])
    group = made.queries.shape[1] // made.cover.opened.shape[1]
    opened = made.cover.opened.repeat_interleave(group, 1)
    opened[:, ::group] = -1  # the first head of each group opens nothing
    summaries = tuple(index.repeat_interleave(group, 1) for index in made.cover.summaries)
    cover = replace(made.cover, opened=opened, summaries=summaries)
    want = oracle(replace(made, cover=cover))
    got = attend(made.queries, made.blocks, cover, made.pyramid, made.positions, made.scale, backend="triton")
    made.compare(got, want.out)


@dataclass
class Broken:
    words: str
    index: int


@pytest.mark.parametrize(
    "broken", [Broken("before the window", 10_000), Broken("sorted", 0), Broken("before the window", -7)]
)
def test_bad_indices_are_refused(broken: Broken) -> None:
    from mgam.attend import attend
    from mgam.errors import SettingError

    made = CASES["levels"].make(DTYPES[-1])
    opened = made.cover.opened.clone()
    opened[-1, 0, 1] = broken.index
    cover = replace(made.cover, opened=opened)
    with pytest.raises(SettingError, match=broken.words):
        attend(made.queries, made.blocks, cover, made.pyramid, made.positions, made.scale, backend="triton")


def test_bad_shapes_are_refused() -> None:
    from mgam.attend import attend
    from mgam.errors import SettingError

    made = CASES["levels"].make(DTYPES[-1])
    with pytest.raises(SettingError, match=r"do not divide|do not hold"):
        attend(made.queries[:, :3], made.blocks, made.cover, made.pyramid, made.positions, made.scale, backend="triton")


def test_a_window_and_block_beyond_the_positions_are_refused() -> None:
    """Their ranks would lie outside the rotary tables."""
    from mgam.attend import attend
    from mgam.errors import SettingError
    from mgam.positions import Positions

    made = CASES["granular"].make(DTYPES[-1])
    reach = made.cover.reach(made.blocks)
    assert reach > 1
    for room in (reach, reach - 1):
        rotary = made.positions.rotary
        assert rotary is not None
        positions = Positions("granular", rotary, rotary.limit - room)
        call = (made.queries, made.blocks, made.cover, made.pyramid, positions, made.scale)
        if room == reach:
            attend(*call, backend="triton")
            continue
        with pytest.raises(SettingError, match=f"span {reach} tokens, but positions were made for {room}"):
            attend(*call, backend="triton")


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shifted_logits(shift: float) -> None:
    """A shift of all logits changes nothing (P11)."""
    from mgam.attend import attend

    made = CASES["levels"].make(torch.float32 if DEVICE == "cpu" else DTYPES[-1])
    with torch.no_grad():
        made.queries[..., 0] = 1.0
        for level in made.pyramid.keys:
            level[..., 0] = shift / made.scale
    got = attend(made.queries, made.blocks, made.cover, made.pyramid, made.positions, made.scale, backend="triton")
    assert torch.isfinite(got).all()

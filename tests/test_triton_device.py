"""Whole calls on the device against the engine with the reference backend."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mgam.engine import Reading, read
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.policies import Scored
from mgam.policies.compact import Compact
from mgam.positions import Positions, Rotary
from mgam.pyramid import Pyramid
from mgam.record import Record
from mgam.schedule import Schedule
from triton_cases import DEVICE, DTYPES, needs_triton

pytestmark = needs_triton

LEVELS = Levels((1, 8, 32), 4)


def made(tokens: int, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    queries = torch.randn(batch, 4, tokens, 64, device=DEVICE).to(dtype)
    keys, values = torch.randn(2, batch, 2, tokens, 64, device=DEVICE).to(dtype)
    return queries, keys, values


def pyramid_of(keys: torch.Tensor, values: torch.Tensor, lengths: list[int] | None = None) -> Pyramid:
    pyramid = Pyramid.of(keys, values, LEVELS, lengths)
    assert pyramid.search is not None
    pyramid.search = pyramid.search.to(keys.dtype)
    return pyramid


@pytest.mark.parametrize("kind", ["absolute", "granular"])
@pytest.mark.parametrize("dense_until", [0, 24, 148])
def test_engine_with_kernels_equals_reference(kind: str, dense_until: int) -> None:
    """Whole calls: blocks that read everything, blocks that choose, an odd end."""
    policy = Scored(budget=24, window=16)
    positions = Positions() if kind == "absolute" else Positions.granular(Rotary.plain(64, 512), 64)
    queries, keys, values = made(157, 1, DTYPES[0])
    plan = Plan.of([Schedule.uniform(16, "block")], [0], [157], 157, dense_until)
    kernels = Reading(policy, LEVELS, positions, dense_until, "triton")
    with torch.no_grad():
        got = read(queries, pyramid_of(keys, values), plan, kernels, 0.125)
    wide = pyramid_of(keys.cpu().double(), values.cpu().double())
    want = read(queries.cpu().double(), wide, plan, replace(kernels, backend="reference"), 0.125)
    error = (got.cpu().double() - want).norm(dim=-1) / want.norm(dim=-1)
    # A tie or a rounded score may flip a choice in half precision, never in single precision.
    assert error.median() < 2e-2
    if got.dtype == torch.float32:
        assert error.max() < 1e-3


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the search runs in half precision, where ties may flip")
@pytest.mark.parametrize(("every", "before"), [(1, 0), (2, 0), (2, 150)])
def test_search_by_kernels_equals_search_in_torch(every: int, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine with all kernels, the search's too, in single precision: a prefill, and tokens after it."""
    from mgam import kernels

    policy = Scored(budget=24, window=16, every=every, whole=0)
    queries, keys, values = made(160, 1, torch.float32)
    schedule = Schedule.uniform(1) if before else Schedule.uniform(16, "block")
    plan = Plan.of([schedule], [before], [160 - before], 160 - before, 0)
    pyramid = pyramid_of(keys, values)  # one for both: search keys of half precision may be rounded otherwise
    with torch.no_grad():
        reading = Reading(policy, LEVELS, Positions(), 0, "reference")
        want = read(queries[:, :, before:], pyramid, plan, reading, 0.125)
        monkeypatch.setattr(kernels, "serve", lambda states: True)
        got = read(queries[:, :, before:], pyramid, plan, replace(reading, backend="triton"), 0.125)
    assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("compact", [None, Compact(dims=64, bits=16, calibrate=40)])
def test_decode_equals_engine(compact: Compact | None) -> None:
    from mgam.device import decode

    policy = replace(Scored(budget=24, window=16), compact=compact)
    queries, keys, values = made(150, 3, DTYPES[0])
    lengths = [150, 97, 41]
    pyramid = pyramid_of(keys, values, lengths)
    asked = torch.stack([queries[row, :, length - 1 : length] for row, length in enumerate(lengths)])
    got = decode(asked, torch.tensor(lengths, device=DEVICE), pyramid, policy, Positions(), 0.125, chunks=18).out
    wide = pyramid_of(keys.cpu().double(), values.cpu().double(), lengths)
    plan = Plan.of([Schedule.uniform(1)] * 3, [length - 1 for length in lengths], [1] * 3, 1, 0)
    want = read(asked.cpu().double(), wide, plan, Reading(policy, LEVELS, Positions(), 0, "reference"), 0.125)
    error = (got.cpu().double() - want).norm() / want.norm()
    assert error < (1e-3 if got.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("compact", [None, Compact(dims=64, bits=16, calibrate=40)])
def test_tables_are_written_by_the_search_or_before_it(
    compact: Compact | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alike, and parts of a cover are merged alike by the last of them and by a launch after them."""
    from mgam import device
    from mgam.attend.triton import forward
    from mgam.policies.one_token_triton import Now

    policy = replace(Scored(budget=24, window=16), compact=compact)
    queries, keys, values = made(150, 3, DTYPES[0])
    lengths = torch.tensor([150, 97, 41], device=DEVICE)
    pyramid = pyramid_of(keys, values, lengths.tolist())
    tables = []
    plain_of, plain_read = Now.of, forward.read
    monkeypatch.setattr(Now, "of", lambda *args: tables.append(plain_of(*args)) or tables[-1])

    def call() -> device.Decoded:
        return device.decode(queries[:, :, :1], lengths, pyramid, policy, Positions(), 0.125, chunks=18, watched=True)

    got = call()
    monkeypatch.setattr(device, "few", lambda *_: False)
    monkeypatch.setattr(device, "read", lambda *args, tickets, **more: plain_read(*args, **more))
    want = call()
    assert torch.equal(tables[0].table, tables[1].table)
    assert tables[0].table.tolist() == [[0, 1, 2], [149, 96, 40], [1, 1, 1], [128, 80, 24], [18, 12, 5]]
    assert torch.equal(tables[0].live, tables[1].live)
    assert not tables[1].tickets.any()
    assert torch.equal(got.cover.opened, want.cover.opened)
    assert got.mass is not None
    assert want.mass is not None
    torch.testing.assert_close(got.mass, want.mass)
    torch.testing.assert_close(got.out, want.out, rtol=2e-3, atol=1e-5 if got.out.dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    ("rows", "kind", "compact"),
    [(1, "granular", None), (3, "absolute", None), (2, "granular", Compact(dims=64, bits=16, calibrate=40))],
)
def test_tokens_one_by_one_equal_reference(
    rows: int, kind: str, compact: Compact | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation by the engine: on a GPU the second token's call is captured, and replayed for those after it, while
    chunks become complete; copies of the cache, and one that was cropped, go on alike."""
    from mgam import kernels, step

    calls: list[object] = []
    plain = step.read
    monkeypatch.setattr(kernels, "serve", lambda states: states.dtype == DTYPES[0])
    monkeypatch.setattr(step, "read", lambda *args: calls.append(args) or plain(*args))
    positions = Positions() if kind == "absolute" else Positions.granular(Rotary.plain(64, 512), 64)
    kernel = Reading(Scored(budget=24, window=16, compact=compact), LEVELS, positions, 0, "triton")
    queries, keys, values = made(160, rows, DTYPES[0])
    pyramids = [Pyramid(LEVELS), Pyramid(LEVELS)]
    for pyramid, dtype in zip(pyramids, (DTYPES[0], torch.float64), strict=True):
        device = DEVICE if dtype == DTYPES[0] else "cpu"
        pyramid.begin(keys.to(device, dtype))
        assert pyramid.search is not None
        pyramid.search = pyramid.search.to(dtype)
        pyramid.append(keys[:, :, :140].to(device, dtype), values[:, :, :140].to(device, dtype), [140, 90, 57][:rows])
    count, copied, cropped = (9, 4, 7) if DEVICE == "cuda" else (4, 2, 3)  # nothing is captured in the interpreter
    for number in range(count):
        if number == copied:
            pyramids = copy.deepcopy(pyramids)
        if number == cropped:
            for pyramid in pyramids:
                pyramid.crop([cropped] * rows)
        new, before = slice(140 + number, 141 + number), list(pyramids[0].lengths)
        plan, got = Plan.of([Schedule.uniform(1)] * rows, before, [1] * rows, 1, 0), []
        records = [Record(evidence_from=90), Record(evidence_from=90)]
        for pyramid, name, record in zip(pyramids, ("triton", "reference"), records, strict=True):
            q, k, v = (states[:, :, new].to(pyramid.keys[0]) for states in (queries, keys, values))
            pyramid.append(k, v)
            with torch.no_grad():
                got.append(read(q, pyramid, plan, replace(kernel, backend=name), 0.125, record=record).cpu().double())
        error = (got[0] - got[1]).norm() / got[1].norm()
        assert error < (1e-3 if DTYPES[0] == torch.float32 else 3e-2)
        if DTYPES[0] == torch.float32:
            assert records[0].entries == records[1].entries
            assert records[0].mass.keys() == records[1].mass.keys() == {0}
            torch.testing.assert_close(records[0].mass[0].double(), records[1].mass[0].double(), rtol=1e-3, atol=1e-4)
    assert len(calls) == count


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
def test_decode_in_a_graph() -> None:
    from mgam.device import decode

    policy = Scored(budget=24, window=16)
    queries, keys, values = made(150, 3, torch.bfloat16)
    pyramid = pyramid_of(keys, values)
    lengths = torch.tensor([150, 97, 41], device=DEVICE)
    asked = queries[:, :, :1].contiguous()

    def call() -> torch.Tensor:
        return decode(asked, lengths, pyramid, policy, Positions(), 0.125, chunks=18).out

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    lengths.copy_(torch.tensor([33, 150, 120]))
    asked.copy_(queries[:, :, 5:6])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, call())


def test_lengths_that_captured_calls_share_are_written_in_every_mode() -> None:
    from mgam.step import Beside, Moment

    beside = object.__new__(Beside)  # without the stream, which needs a GPU
    beside._lengths = {}
    for mode, length in ((torch.inference_mode, 5), (torch.no_grad, 7), (torch.inference_mode, 9)):
        with mode():
            moment = Moment(torch.tensor([length], device=DEVICE), torch.zeros(1), 0, True)
            assert beside.lengths_of(moment).tolist() == [length]


def test_a_result_goes_where_the_arguments_say() -> None:
    """What a captured call takes and gives: queries copied to one place, whatever their strides and number; results in
    a new tensor each time, from a copy where the kernel that makes them cannot write there."""
    from mgam.arguments_triton import Arguments, send

    stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
    queries = torch.randn(5, 3, 4, 150, device=DEVICE)[:, :, :, 1:].transpose(1, 2)
    arguments, before = Arguments(queries), []
    for number in range(4):
        out = arguments.enter(queries + number, stream)
        assert torch.equal(arguments.queries, queries + number)
        assert int(arguments.place) == out.data_ptr()
        send(2 * arguments.queries, arguments.place)
        before.append(out)
    for number, out in enumerate(before):
        assert out.is_contiguous()
        assert torch.equal(out, 2 * (queries + number))


@pytest.mark.parametrize("group", [2, 40])
def test_decode_writes_where_it_is_told(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel that merges parts of a cover, and from a copy where a group is too large for that."""
    from mgam.arguments_triton import Arguments
    from mgam.attend.triton import forward
    from mgam.device import decode

    _, keys, values = made(150, 2, DTYPES[0])
    pyramid, asked = pyramid_of(keys, values), torch.randn(2, 2 * group, 1, 64, device=DEVICE).to(DTYPES[0])
    lengths = torch.tensor([150, 97], device=DEVICE)
    given = lengths, pyramid, Scored(budget=24, window=16), Positions(), 0.125
    want, copies, send = decode(asked, *given, chunks=18).out, [], forward.send
    monkeypatch.setattr(forward, "send", lambda *args: copies.append(args) or send(*args))
    arguments = Arguments(asked)
    out = arguments.enter(asked, torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0)
    decode(arguments.queries, *given, chunks=18, place=arguments.place)
    assert torch.equal(out, want)
    assert len(copies) == (group > 32)

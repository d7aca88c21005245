"""Pages that a kernel copies from pinned memory into a pool, against pages that the CPU copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from documents import tiny
from mgam import engine, kernels, pyramid
from mgam.attend import attend, blockwise, dispatch, watched
from mgam.attend.dispatch import serving
from mgam.cover import Cover, Known
from mgam.documents import second_look
from mgam.documents.document import Document
from mgam.documents.paged import PagedPyramid
from mgam.documents.pool import Pool
from mgam.documents.rehearsing import ask_once
from mgam.documents.store.layout import Shape
from mgam.documents.tiers import HostPages
from mgam.levels import Levels
from triton_cases import DEVICE, DTYPES, Case, Made, in_float64, needs_triton, oracle

pytestmark = needs_triton

HEADS, CHUNKS, LAYERS = 2, 9, 2

PAGED = {
    "absolute": Case(tokens=150, sizes=(1, 8, 32), few=3),
    "granular": Case(tokens=150, sizes=(1, 8, 32), few=3, granular=True),
    "drop": Case(tokens=150, rest="drop", few=3, granular=True),
    "softcap": Case(tokens=150, softcap=5.0, few=3),
    "no entries": Case(tokens=150, rest="drop", opened=0, few=3, granular=True, sink=False),
    "window inside a chunk": Case(tokens=150, sizes=(1, 8, 32), few=3, granular=True),
}


def pools(chunk: int, dim: int) -> tuple[Pool, Pool, HostPages]:
    """A pool that reads host memory itself, one that is given staged pages, and the pages of both."""
    shape = Shape(LAYERS, 4, HEADS, dim, "bfloat16", Levels((1, chunk, 4 * chunk)), 0, 16)
    made = torch.randint(0, 256, (LAYERS, CHUNKS, HEADS, shape.page_bytes), dtype=torch.uint8)
    host = HostPages([layer.pin_memory() if DEVICE == "cuda" else layer for layer in made])
    one, other = (Pool(shape, 3 * HEADS, torch.device(DEVICE)) for _ in range(2))
    one.place, other.fetch = host.place, host.fetch
    for pool in (one, other):
        pool.reserve(CHUNKS)
    return one, other, host


@pytest.mark.parametrize(("chunk", "dim"), [(8, 64), (64, 96), (4, 256)])
def test_placed_as_staged(chunk: int, dim: int) -> None:
    one, other, _ = pools(chunk, dim)
    rng = np.random.default_rng(0)
    for step in range(12):
        heads, chunks = rng.integers(0, HEADS, 5), rng.integers(0, CHUNKS, 5)
        found = [pool.slots_of(step % LAYERS, heads, chunks) for pool in (one, other)]
        for kept in ("keys", "values"):
            got, want = (getattr(pool, kept)[slots] for pool, slots in zip((one, other), found, strict=True))
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert one.counts == other.counts
    assert one.counts.fetched > 3 * HEADS


def test_pages_of_another_size_are_refused() -> None:
    from mgam.documents.place_triton import place_pages

    one, _, host = pools(8, 64)
    none = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit"):
        place_pages(host.layers[0].view(-1, host.layers[0].shape[-1])[:, :-16], none, none, one.keys, one.values)


@pytest.mark.skipif(DEVICE == "cpu", reason="only a CUDA device reads pinned memory itself")
def test_a_gpu_takes_plain_pinned_pages_itself() -> None:
    one, other, host = pools(64, 64)
    one.place = other.fetch = None
    host.serve(one)
    HostPages([layer.clone() for layer in host.layers]).serve(other)
    assert one.place is not None
    assert one.fetch is None
    assert other.place is None
    assert other.fetch is not None


def paged(made: Made) -> PagedPyramid:
    """The case's states as those of a digest."""
    keys, values = (states[0][:, :, : made.pyramid.tokens] for states in (made.pyramid.keys, made.pyramid.values))
    _, heads, tokens, dim = keys.shape
    levels, dtype = made.pyramid.levels, str(keys.dtype).removeprefix("torch.")
    shape = Shape(1, made.queries.shape[1], heads, dim, dtype, levels, 0, 8 * keys.element_size())
    pool = Pool(shape, heads * (tokens // levels.chunk + 2), keys.device)
    pyramid = PagedPyramid(levels, pool, 0, tokens)
    pyramid.append(keys, values)
    return pyramid


@pytest.mark.parametrize(("name", "known"), [*((name, False) for name in PAGED), ("granular", True)])
def test_kernels_read_pages_as_the_oracle_reads_memory(name: str, known: bool) -> None:
    """Several blocks at once, of which the last is shorter; `known`: as kernels make covers, or as PyTorch does."""
    made = PAGED[name].make(DTYPES[-1])
    if name == "window inside a chunk":
        made = replace(made, cover=replace(made.cover, window_start=made.cover.window_start + 3))
    if known:
        begin = made.cover.window_start.cpu()
        made = replace(made, cover=replace(made.cover, known=Known(begin, made.cover.most)))
    pyramid, want = paged(made), oracle(made)
    given = made.queries, made.blocks, made.cover, pyramid, made.positions, made.scale, made.softcap
    live = torch.arange(made.blocks.size, device=DEVICE) < made.blocks.length.to(DEVICE)[:, None]
    live = live[:, None, :, None]
    with torch.no_grad():
        assert serving(made.queries, pyramid) == "triton"
        made.compare(attend(*given), want.out)
        made.compare(attend(*given, "torch") * live, want.out)  # which says nothing of rows that are not there
        if not made.cover.opened.shape[-1]:
            return
        wide = in_float64(made)
        for states in (*wide.pyramid.keys, *wide.pyramid.values):
            states.nan_to_num_(0.0)
        mass = blockwise.masses(
            wide.queries, wide.blocks, wide.cover, wide.pyramid, wide.positions, wide.scale, wide.softcap
        )
        for backend in (None, "torch"):
            out, got = watched(*given, backend)
            made.compare(out * live, want.out)
            assert (got.cpu().double() - mass).norm() / mass.norm() < made.tolerance


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the search runs in half precision, where ties may flip")
def test_a_digest_is_asked_alike_with_covers_made_by_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU kernels search and make the covers by which pages are fetched and read."""
    model, tokenizer = tiny.make_model(), tiny.make_tokenizer()
    Document.digest(model, tokenizer, [tiny.source(300)], tmp_path / "book.mgam", **tiny.GRID).close()
    monkeypatch.setattr(pyramid, "search_dtype", lambda dtype: dtype)  # Triton's interpreter multiplies no bfloat16
    document = Document.open(tmp_path / "book.mgam", model, tokenizer)
    refused = dispatch._refused
    monkeypatch.setattr(
        dispatch, "_refused", lambda name, queries: ("off",) if name == "triton" else refused(name, queries)
    )
    covers: list[Cover] = []
    choose = engine._choose

    def kept(*given: object) -> Cover:
        covers.append(choose(*given))  # type: ignore[arg-type]
        return covers[-1]

    monkeypatch.setattr(engine, "_choose", kept)
    ids, count = torch.arange(40, 60)[None], len(document.tokens)
    logits = []
    for served in (False, True):
        monkeypatch.setattr(kernels, "serve", lambda states, served=served: served)
        cache = document.start(ids.shape[1])
        with torch.no_grad():
            places = torch.arange(count, count + ids.shape[1])[None]
            logits.append(model(ids, position_ids=places, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    half = len(covers) // 2
    for plain, made in zip(covers[:half], covers[half:], strict=True):
        assert made.known is not None
        for one, other in ((plain.opened, made.opened), *zip(plain.summaries, made.summaries, strict=True)):
            for block, same in zip(one.flatten(0, 1).tolist(), other.flatten(0, 1).tolist(), strict=True):
                assert {index for index in block if index >= 0} == {index for index in same if index >= 0}


class Noted:
    """In place of a kernel: notes how it would be specialised, and writes something finite."""

    WRITES: ClassVar[dict[str, tuple[int, ...]]] = {
        "read_kernel": (1, 2), "merge_kernel": (2, 3), "mass_kernel": (2,), "whole_kernel": (1, 2)
    }  # fmt: skip

    def __init__(self, name: str, seen: set[Any]) -> None:
        self._name, self._seen = name, seen

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*given: Any, **named: Any) -> None:
            self._seen.add((self._name, *sorted(named.items(), key=lambda one: one[0])))
            for number in self.WRITES[self._name]:
                given[number].fill_(1.0)

        return launch


@pytest.mark.skipif(
    DEVICE == "cuda",
    reason="its model is on the CPU, where kernels are taken up in Triton's interpreter only; it launches none",
)
def test_who_asks_after_a_rehearsal_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgam.attend.triton import forward, masses, prefill

    model, tokenizer = tiny.make_model(question_block=32, reread=64), tiny.make_tokenizer()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_refused", lambda name, queries: ("off",) if name == "triton" else ())
        document = Document.digest(model, tokenizer, [tiny.source(300)], tmp_path / "book.mgam", **tiny.GRID)
    seen: set[Any] = set()
    for module in (forward, masses, prefill):
        for name in [name for name in vars(module) if name in Noted.WRITES]:
            monkeypatch.setattr(module, name, Noted(name, seen))
    monkeypatch.setattr(engine, "_compiled", lambda queries: True)
    monkeypatch.setattr(second_look, "DISTINCT", 0.0)
    monkeypatch.setattr(second_look, "SENTENCE", 0)  # passages of tiny texts would grow many times over
    ask_once(document, 64)
    rehearsed = set(seen)
    assert len(rehearsed) > 5
    for question in ("Who?", "Where did the captain of the first ship go?", "And then? " * 9):
        assert "read again" in document.ask(question, max_new_tokens=3).tokens
    assert seen == rehearsed

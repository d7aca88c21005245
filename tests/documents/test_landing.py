"""What stays in memory of a digest comes to a device piece by piece, and is checked on its way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mgam.documents.store import landing, segment
from mgam.errors import DigestError

from . import tiny
from .conftest import Make

CPU = torch.device("cpu")


@pytest.fixture(params=[64, 1000, 2**22])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes at a time: far fewer than the whole numbers, not a divisor of anything, all at once."""
    for module in (landing, segment):
        monkeypatch.setattr(module, "PIECE", request.param)
    return int(request.param)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_landing_on_a_device_holds_what_main_memory_would(digest: Make, piece: int, eight_bits: bool) -> None:
    store = digest(tiny.source(300), eight_bits=eight_bits).store
    one = landing.DeviceLanding(CPU)
    for number, part in enumerate(store.manifest.segments):
        plain, moved = store.resident(number), store.resident(number, one)
        assert moved.moved is not None
        assert len(moved.data) == moved.layout.numbers_end < len(plain.data)
        for kind in ("keys.1", "values.2", "search"):
            assert torch.equal(plain.states(kind), moved.states(kind))
        assert torch.equal(plain["layers.1.rest"], moved["layers.1.rest"])
        for name in ("ids", "texts", "offsets"):
            assert (plain.numbers(name) == moved.numbers(name)).all()
            assert len(moved.numbers(name)) == part.tokens
        assert (plain.checks() == moved.checks()).all()


def test_damage_anywhere_is_found_on_the_way_to_a_device(digest: Make, piece: int, tmp_path: Path) -> None:
    store = digest(tiny.source(300)).store
    layout = store.manifest.layout(store.manifest.segments[0])
    file, one = store.path(0), landing.DeviceLanding(CPU)
    whole = file.read_bytes()
    for place in (len(layout.header), layout.numbers_end - 1, layout.numbers_end, layout.pages_begin - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DigestError, match=rf"{file.name} is damaged between byte 0 and {layout.pages_begin:,}"):
            store.resident(0, one)
    file.write_bytes(whole)
    assert (store.resident(0, one).numbers("ids") == store.resident(0).numbers("ids")).all()


def test_a_file_that_ends_early_is_damaged(digest: Make, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = digest(tiny.source(300)).store
    layout = store.manifest.layout(store.manifest.segments[0])
    read, end = os.preadv, layout.pages_begin - 1

    def short(descriptor: int, views: list[memoryview], offset: int) -> int:
        return read(descriptor, [views[0][: max(0, end - offset)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    for one in (landing.Landing(), landing.DeviceLanding(CPU)):
        with pytest.raises(DigestError, match="is damaged between byte 0"):
            store.resident(0, one)


def test_residents_come_to_a_device(digest: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    document = digest(tiny.source(900))
    expected = document.ask("What is it?", max_new_tokens=3).answer
    document.close()
    monkeypatch.setattr("mgam.documents.store.store.landing_on", landing.DeviceLanding)
    again = document.open(document.path, document.model, document.tokenizer)
    assert len(document.manifest.segments) > 3
    assert again.ask("What is it?", max_new_tokens=3).answer == expected

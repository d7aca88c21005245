"""The store keeps what it was given through kills, full disks, second writers and read-only folders."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgam.documents.document import Document
from mgam.documents.fingerprint import of_tokenizer
from mgam.documents.store import Manifest, verify
from mgam.documents.store.lock import WriterLock
from mgam.documents.store.manifest import Segment, Text
from mgam.documents.store.names import is_ours
from mgam.documents.tiers import parse_memory
from mgam.errors import DigestError, DocumentError, MgamError, SettingError, UnsupportedModelError

from . import tiny
from .conftest import Make
from .tiny import contents, source

LENGTH = 2500
WRITERS = multiprocessing.get_context("forkserver")
WRITERS.set_forkserver_preload(["tests.documents.tiny"])


def start(folder: Path) -> Any:
    """A process that digests; its libraries are loaded when it starts."""
    process = WRITERS.Process(target=tiny.run, args=(str(folder), LENGTH))
    process.start()
    return process


def finish(folder: Path) -> float:
    """Lets a process digest, and returns the seconds it took."""
    began = time.perf_counter()
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - began


def resumes(folder: Path, whole: Path, choice: random.Random, seconds: float, kills: int) -> None:
    """Kills running digests at random moments, then lets one finish: nothing is lost but the open segment."""
    done = 0
    while kills:
        process = start(folder)
        process.join(choice.random() * seconds)
        if process.is_alive():
            process.kill()
            kills -= 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:  # it was through before: another one is begun
            assert contents(folder) == contents(whole)
            shutil.rmtree(folder)
            done = 0
        elif (folder / "manifest.json").exists():
            assert Manifest.read(folder).done >= done
            done = Manifest.read(folder).done
            assert not verify(folder)
    finish(folder)
    assert contents(folder) == contents(whole)


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A digest that ran through, and the seconds it took."""
    folder = tmp_path_factory.mktemp("through")
    finish(folder / "warm.mgam")
    return folder / "book.mgam", finish(folder / "book.mgam")


def test_kill_and_resume(through: tuple[Path, float], tmp_path: Path) -> None:
    resumes(tmp_path / "book.mgam", through[0], random.Random(1), through[1], 5)


@pytest.mark.slow
def test_kill_at_fifty_moments_and_resume(through: tuple[Path, float], tmp_path: Path) -> None:
    for number in range(25):
        resumes(tmp_path / f"{number}.mgam", through[0], random.Random(number), through[1], 2)


def test_a_second_writer_is_refused_and_readers_are_not(
    digest: Make, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    document = digest(source(400))
    with WriterLock(tmp_path / "book.mgam"):
        with pytest.raises(DigestError, match="being written by another process"):
            digest(source(100, 1), append=True)
        other = Document.open(tmp_path / "book.mgam", model, tokenizer)
        assert other.ask("who?", max_new_tokens=3).answer == document.ask("who?", max_new_tokens=3).answer


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may have more than 40 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_nothing_is_lost(
    digest: Make, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest(source(900), name="whole.mgam")
    sizes = [len(data) for name, data in contents(tmp_path / "whole.mgam").items() if name.startswith("segment")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int, total: int) -> None:
        if done >= 300:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) // 2, limits[1]))

    with pytest.raises(DigestError, match="no room to write"):
        digest(source(900), on_progress=fill)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    manifest = Manifest.read(tmp_path / "book.mgam")
    assert manifest.done == 256
    assert not verify(tmp_path / "book.mgam")
    assert not list((tmp_path / "book.mgam").glob("*.part"))
    digest(source(900))
    assert contents(tmp_path / "book.mgam") == contents(tmp_path / "whole.mgam")


def test_too_little_room_is_said_before_anything_is_read(digest: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(DigestError, match=r"takes about .* free where"):
        digest(source(400))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said(digest: Make, tmp_path: Path) -> None:
    (tmp_path / "book.mgam").mkdir(mode=0o500)
    with pytest.raises(DigestError, match="may not be written by you"):
        digest(source(400))


def test_a_folder_that_refuses_writing_is_said(digest: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DigestError, match="may not be written by you"):
        digest(source(400))


def test_a_read_only_digest_can_be_asked(digest: Make, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    digest(source(400))
    for file in (tmp_path / "book.mgam").iterdir():
        file.chmod(0o400)
    (tmp_path / "book.mgam").chmod(0o500)
    assert Document.open(tmp_path / "book.mgam", model, tokenizer).ask("who?", max_new_tokens=2).tokens["answer"] > 0
    (tmp_path / "book.mgam").chmod(0o700)


def test_another_model_tokenizer_or_number_format_is_refused(digest: Make, model: Any, tmp_path: Path) -> None:
    import torch

    digest(source(300))
    path, tokenizer = tmp_path / "book.mgam", tiny.make_tokenizer()
    with pytest.raises(DigestError, match="made with tiny, and other weights"):
        Document.open(path, tiny.make_model(1), tokenizer)
    with pytest.raises(DigestError, match="was made in float32, the model is in bfloat16"):
        Document.open(path, tiny.make_model(dtype=torch.bfloat16), tokenizer)
    with pytest.raises(DigestError, match="made with another tokenizer"):
        Document.open(path, model, tiny.make_tokenizer(template=False))
    with pytest.raises(DigestError, match="begun with other settings"):
        digest(model=tiny.make_model(budget=32))


def test_a_tokenizer_is_known_whatever_was_done_with_it() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    before = of_tokenizer(tokenizer)
    tokenizer(["a long text", "b"], truncation=True, max_length=4, padding="max_length")
    assert of_tokenizer(tokenizer) == before
    tokenizer.add_tokens(["harpooneer"])
    assert of_tokenizer(tokenizer) != before


def test_a_source_that_changed_is_said(digest: Make) -> None:
    digest(source(300))
    with pytest.raises(DigestError, match="text 0 as it was, and it has changed since"):
        digest(tiny.Source("text 0", "Something else."))
    with pytest.raises(DigestError, match="holds other texts; add these with --append"):
        digest(source(300, 1))


def test_texts_of_one_name_are_told_apart(digest: Make) -> None:
    with pytest.raises(DocumentError, match="text 0 is given twice"):
        digest(source(300), source(300))
    digest(source(300))
    with pytest.raises(DigestError, match=r"holds text 0 as it was.*add it under another name"):
        digest(tiny.Source("text 0", "Something else."), append=True)
    digest(tiny.Source("<stdin>", "One thing."), append=True)
    assert len(digest(tiny.Source("<stdin>", "Another thing."), append=True).manifest.texts) == 3


def test_folders_that_are_no_digests(digest: Make, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "book.mgam").mkdir()
    (tmp_path / "book.mgam" / "mine.txt").write_text("keep me")
    with pytest.raises(DigestError, match=r"holds other files \(mine.txt\)"):
        digest(source(300))
    digest(source(300), name="real.mgam")
    (tmp_path / "link.mgam").symlink_to(tmp_path / "real.mgam")
    for name, said in (("link.mgam", "symbolic link"), ("none.mgam", "does not exist"), ("book.mgam", "not a digest")):
        with pytest.raises(DigestError, match=said):
            Document.open(tmp_path / name, model, tokenizer)
    with pytest.raises(DigestError, match="symbolic link"):
        digest(source(300), name="link.mgam")
    with pytest.raises(DocumentError, match="no text"):
        digest(name="empty.mgam")


@pytest.mark.parametrize(
    "names",
    [
        ["text-1.txt", "text-notes.md", "segment-plan.txt"],
        ["text-000000.txt"],  # as a digest calls its own
        ["text-000000.txt", "segment-000000.safetensors", "neutral.json"],
        ["manifest.json"],  # of another program
    ],
)
def test_files_of_others_are_left_alone(digest: Make, tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "book.mgam"
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"{{}} {name}")
    with pytest.raises(DigestError, match="is not JSON" if names == ["manifest.json"] else "holds other files"):
        digest(source(300))
    assert {file.name: file.read_text() for file in folder.iterdir()} == {name: f"{{}} {name}" for name in names}


def test_only_what_a_digest_wrote_is_swept(digest: Make, tmp_path: Path) -> None:
    folder = tmp_path / "book.mgam"
    digest(source(300))
    left = ["segment-000009.safetensors", "segment-000001-000099.safetensors", "manifest.json.part", "text-000007.txt"]
    others = ["text-1.txt", "text-notes.md", "segment-plan.txt", "text-000001.txt.bak", "segment-000001.txt"]
    for name in (*left, *others):
        (folder / name).write_text("here")
    digest(source(300, 1), append=True)
    names = {file.name for file in folder.iterdir()}
    assert names.isdisjoint(left)
    assert names >= set(others)


def test_a_digest_knows_the_names_that_it_gives() -> None:
    for number in (0, 12, 999_999, 1_000_000):
        own = [Text.file_of(number), Segment.file_of(number, 64, 128), Segment.file_of(number, 128, 128)]
        assert all(is_ours(name) and is_ours(f"{name}.part") for name in own)
    for name in ("text-00001.txt", "text-000001.txt\n", "text-٠٠٠٠٠١.txt", "my text-000001.txt", "text-000001.part"):
        assert not is_ours(name)


def test_a_digest_that_was_stopped_before_its_manifest_goes_on(digest: Make, tmp_path: Path) -> None:
    digest(source(300), name="whole.mgam")
    folder = tmp_path / "book.mgam"
    folder.mkdir()
    with WriterLock(folder):
        (folder / "text-000000.txt").write_text("a part")
        (folder / "manifest.json.part").write_text("a part")
    digest(source(300))
    assert contents(folder) == contents(tmp_path / "whole.mgam")


def test_what_a_digest_cannot_hold_is_refused(digest: Make) -> None:
    for method, budget in (("quest", 16), ("snapkv", 256), ("h2o", 16)):
        with pytest.raises(UnsupportedModelError, match=f"{method}' keeps more than keys, values and summaries"):
            digest(source(300), model=tiny.make_model(method=method, budget=budget))
    with pytest.raises(SettingError, match="needs a method that chooses"):
        digest(source(300), model=tiny.make_model(method="dense"), memory="1GiB")
    with pytest.raises(MgamError, match="lone surrogate"):
        digest(tiny.Source("odd", "a\ud800b"))


def test_sizes_of_memory() -> None:
    assert [parse_memory(text) for text in ("2GiB", "1.5 mb", "7", 9, None)] == [2 << 30, 3 << 19, 7, 9, None]
    with pytest.raises(SettingError, match="is no size"):
        parse_memory("-2GiB")

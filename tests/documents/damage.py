"""Ways to damage a digest, and what must follow: a clear refusal, or the answer that the whole digest gives."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgam.documents.document import Document
from mgam.documents.store import neutral, verify
from mgam.errors import MgamError

Harm = Callable[[Path, random.Random], None]
QUESTION = "who?"


@dataclass
class Scene:
    """A whole digest, another one of the same size, and the answer that the first gives."""

    model: Any
    tokenizer: Any
    whole: Path
    foreign: Path
    answer: str

    def trial(self, folder: Path, seed: int) -> str:
        """Damages a copy in `folder` and returns what came of it.

        Raises:
            AssertionError: a wrong answer, or damage that `verify` does not see.
            Exception: anything but a clear refusal.
        """
        choice = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole, folder)
        kind = choice.choice(sorted(HARMS))
        if kind == "foreign":
            name = _segment(folder, choice).name
            shutil.copyfile(self.foreign / name, folder / name)
        elif kind == "foreign manifest":
            shutil.copyfile(self.foreign / "manifest.json", folder / "manifest.json")
        else:
            HARMS[kind](folder, choice)
        if _same(folder, self.whole):
            return "unharmed"
        seen = _faults(folder)
        try:
            document = Document.open(folder, self.model, self.tokenizer, room=64)
            answer = document.ask(QUESTION, max_new_tokens=3).answer
            document.close()
        except MgamError as error:
            if not str(error).strip():
                raise AssertionError(f"{kind} {seed}: refused without a word") from error
            return f"refused: {kind}"
        assert answer == self.answer, f"{kind} {seed}: a wrong answer"
        assert seen or kind in FORGED, f"{kind} {seed}: verify sees nothing"
        return f"not touched by the question: {kind}"


def _faults(folder: Path) -> bool:
    try:
        return bool(verify(folder))
    except MgamError:
        return True


def _same(one: Path, other: Path) -> bool:
    for file in other.iterdir():
        twin = one / file.name
        if twin.is_symlink() or not twin.is_file() or twin.stat().st_size != file.stat().st_size:
            return False
        if twin.read_bytes() != file.read_bytes():
            return False
    return True


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name != "writer.lock")


def _segment(folder: Path, choice: random.Random) -> Path:
    return choice.choice([file for file in _files(folder) if file.name.startswith("segment")])


def _flip(folder: Path, choice: random.Random) -> None:
    file = choice.choice(_files(folder))
    data = bytearray(file.read_bytes())
    for _ in range(choice.choice([1, 1, 2, 8])):
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    file.write_bytes(data)


def _cut(folder: Path, choice: random.Random) -> None:
    file = choice.choice(_files(folder))
    data = file.read_bytes()
    file.write_bytes(data[: choice.randrange(len(data))])


def _lengthen(folder: Path, choice: random.Random) -> None:
    file = choice.choice(_files(folder))
    file.write_bytes(file.read_bytes() + choice.randbytes(choice.choice([1, 16, 5000])))


def _blank(folder: Path, choice: random.Random) -> None:
    file = choice.choice(_files(folder))
    data = bytearray(file.read_bytes())
    begin = choice.randrange(len(data))
    end = min(len(data), begin + choice.choice([1, 512, 4096]))
    data[begin:end] = bytes(end - begin)
    file.write_bytes(data)


def _swap_files(folder: Path, choice: random.Random) -> None:
    one, other = choice.sample(_files(folder), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _swap_parts(folder: Path, choice: random.Random) -> None:
    file = _segment(folder, choice)
    data = bytearray(file.read_bytes())
    size = choice.choice([64, 1024, 4096])
    count = len(data) // size
    if count > 1:
        one, other = (place * size for place in choice.sample(range(count), 2))
        data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    file.write_bytes(data)


def _remove(folder: Path, choice: random.Random) -> None:
    choice.choice([file for file in _files(folder) if file.name != neutral.NAME]).unlink()  # which may be missing


def _link(folder: Path, choice: random.Random) -> None:
    file = choice.choice(_files(folder))
    aside = folder / "aside"
    file.rename(aside)
    file.symlink_to(aside)


def _other_kind(folder: Path, choice: random.Random) -> None:
    file = choice.choice(_files(folder))
    file.unlink()
    if choice.random() < 0.5:
        file.mkdir()
    else:
        os.mkfifo(file)


def _forge(change: Callable[[dict[str, Any], random.Random], None]) -> Harm:
    """A manifest with one thing changed and a checksum that fits."""

    def harm(folder: Path, choice: random.Random) -> None:
        path = folder / "manifest.json"
        body = json.loads(path.read_bytes())
        del body["checksum"]
        change(body, choice)
        path.write_bytes(sealed(body))

    return harm


def sealed(body: dict[str, Any]) -> bytes:
    """A manifest's bytes with the checksum that fits."""
    plain = (json.dumps(body, indent=1) + "\n").encode()
    return (json.dumps({**body, "checksum": hashlib.sha256(plain).hexdigest()}, indent=1) + "\n").encode()


def _huge(body: dict[str, Any], choice: random.Random) -> None:
    number = choice.choice([2**31, 2**39, 2**63, 2**64, 10**30, -1, 0, 1.5, True, None, "9", [], {}])
    place = choice.choice(
        ["tokens", "grid", "call", "segment", "first", "layers", "heads", "dim", "sizes", "text", "recent"]
    )
    if place in ("tokens", "grid", "call"):
        body[place] = number if number != body[place] else 7
    elif place in ("segment", "first"):
        choice.choice(body["segments"])["tokens" if place == "segment" else "first"] = number if number else 2**33
    elif place == "sizes":
        body["shape"]["levels"]["sizes"] = choice.choice([[1, number], [number], [1, 2**32], number])
    elif place == "text":
        body["texts"][0]["bytes"] = number
    elif place == "recent":
        body["shape"]["recent"] = number if number and number is not True else 2**23
    else:
        body["shape"][place] = number


def _lead_out(body: dict[str, Any], choice: random.Random) -> None:
    name = choice.choice(
        ["../segment-000000.safetensors", "/etc/passwd", "..", ".", "", "a/b", "nul\0byte", "~/x", "C:\\x"]
    )
    choice.choice(body[choice.choice(["segments", "texts"])])["file"] = name


def _other_format(body: dict[str, Any], choice: random.Random) -> None:
    body["version"] = choice.choice([0, 2, -1, 4, 99, "3", None, True, 3.0, [3]])


def _lose_a_part(body: dict[str, Any], choice: random.Random) -> None:
    name = choice.choice(list(body))
    if choice.random() < 0.5:
        del body[name]
    else:
        body[name] = choice.choice([None, [], {}, "x", -3, [[]], {"a": 1}])


def _other_list(body: dict[str, Any], choice: random.Random) -> None:
    kind = choice.choice(["repeat", "drop", "turn", "many"])
    parts = body["segments"]
    if kind == "repeat":
        parts.append(dict(parts[0]))
    elif kind == "drop":
        del parts[choice.randrange(len(parts))]
    elif kind == "turn":
        parts.reverse()
    else:
        parts.extend(dict(parts[0]) for _ in range(5000))


def _not_a_manifest(folder: Path, choice: random.Random) -> None:
    junk = [
        b"", b"null", b"[]", b"{}", b'{"format": "mgam digest"}', b"[" * 100_000, b"{\"a\":" * 50_000, b"9" * 10_000,
        b'{"format": "mgam digest", "version": 3, "tokens": NaN}', b"\xff\xfe\x00", choice.randbytes(300),
        b"\x80\x04K\x01.",
        b'{"format": "mgam digest", "version": 0}', b'{"format": "mgam digest", "version": 3}' + b" " * (17 << 20),
    ]  # fmt: skip
    (folder / "manifest.json").write_bytes(choice.choice(junk))


def _huge_header(folder: Path, choice: random.Random) -> None:
    file = _segment(folder, choice)
    data = bytearray(file.read_bytes())
    data[:8] = choice.choice([2**63, 2**40, 0, 2**32]).to_bytes(8, "little")
    file.write_bytes(data)


def _sparse(folder: Path, choice: random.Random) -> None:
    """A file that says it is huge, and takes no room."""
    with choice.choice(_files(folder)).open("r+b") as file:
        file.truncate(1 << 40)


def _nothing(folder: Path, choice: random.Random) -> None:
    """Stands for damage that needs a second store; whoever applies it must take that path."""
    raise AssertionError("this damage is made from another store, not in place")


HARMS: dict[str, Harm] = {
    "flip": _flip,
    "flip again": _flip,
    "cut": _cut,
    "lengthen": _lengthen,
    "blank": _blank,
    "swap files": _swap_files,
    "swap parts": _swap_parts,
    "remove": _remove,
    "link": _link,
    "other kind": _other_kind,
    "huge": _forge(_huge),
    "lead out": _forge(_lead_out),
    "other format": _forge(_other_format),
    "lose a part": _forge(_lose_a_part),
    "other list": _forge(_other_list),
    "not a manifest": _not_a_manifest,
    "huge header": _huge_header,
    "sparse": _sparse,
    "foreign": _nothing,
    "foreign manifest": _nothing,
}
FORGED = {"lose a part"}
"""A manifest with a checksum that fits may name other versions of libraries, say, and be none the worse."""

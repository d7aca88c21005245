"""The manifest: what a digest holds and how it was made, as JSON with a checksum.

It carries no times: equal digests have equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mgam.documents.store import files
from mgam.documents.store.layout import CODES, Layout, Shape, layout_of
from mgam.errors import DigestError, SettingError
from mgam.levels import Levels
from mgam.settings import Settings

NAME = "manifest.json"
FORMAT = "mgam digest"
VERSION = 3
MOST_BYTES = 1 << 24
MOST_TOKENS = 1 << 40
_OLDER = "it was made by an older mgam; digest the texts again"
_NEWER = "it was made by a newer mgam; update mgam"


@dataclass(frozen=True)
class Text:
    """A source, kept with the digest so that evidence can be quoted and a stopped digest goes on."""

    name: str
    """What the user called it."""
    file: str
    bytes: int
    sha256: str

    @staticmethod
    def hash(text: str) -> str:
        """The checksum of a text."""
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    @staticmethod
    def file_of(number: int) -> str:
        """The name of the file that holds text `number`."""
        return f"text-{number:06d}.txt"


@dataclass(frozen=True)
class Segment:
    """A part of the digest in a file of its own. `sha256` is of all bytes before the pages, which have own checks."""

    file: str
    first: int
    tokens: int
    sha256: str

    @staticmethod
    def file_of(number: int, tokens: int, grid: int) -> str:
        """The name of segment `number`; the last one, which an append will replace, also says its length."""
        tail = "" if tokens == grid else f"-{tokens:06d}"
        return f"segment-{number:06d}{tail}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """All that a folder holds. `complete` is false while texts wait to be read."""

    model: dict[str, Any]
    """`name` and `fingerprint`."""
    tokenizer: str
    """Fingerprint."""
    shape: Shape
    settings: Settings
    dense_until: int
    call: int
    """Tokens read in one call."""
    grid: int
    """Tokens in a segment; a multiple of call, block and the largest chunk."""
    tokens: int
    """Tokens of all texts."""
    texts: tuple[Text, ...]
    segments: tuple[Segment, ...]
    complete: bool
    made_with: dict[str, str]

    @property
    def done(self) -> int:
        """Tokens that are digested."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def whole(self) -> tuple[Segment, ...]:
        """Segments that an append leaves alone."""
        return tuple(segment for segment in self.segments if segment.tokens == self.grid)

    def with_(self, **changes: Any) -> Manifest:
        """The same with some parts changed."""
        return replace(self, **changes)

    def layout(self, segment: Segment) -> Layout:
        """Where the tensors of a segment stand."""
        return layout_of(self.shape, segment.tokens)

    def dump(self) -> bytes:
        """The file's bytes."""
        shape = asdict(self.shape)
        shape["levels"] = {"sizes": list(self.shape.levels.sizes), "search": self.shape.levels.search}
        body = {
            "format": FORMAT, "version": VERSION, "complete": self.complete, "tokens": self.tokens, "model": self.model,
            "tokenizer": self.tokenizer, "shape": shape, "settings": self.settings.as_dict(),
            "dense_until": self.dense_until,
            "call": self.call, "grid": self.grid, "texts": [asdict(text) for text in self.texts],
            "segments": [asdict(segment) for segment in self.segments], "made_with": self.made_with,
        }  # fmt: skip
        return _canonical({**body, "checksum": _checksum(body)})

    def write(self, folder: Path) -> None:
        """Puts it in place of the one before, at once for every reader."""
        files.write_small(folder, NAME, self.dump())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a digest, checked.

        Raises:
            DigestError: not a digest, of another format, or damaged; says which.
        """
        files.refuse_link(folder)
        if not folder.is_dir():
            if not folder.exists():
                raise DigestError(f"{folder} does not exist; a digest is made with: mgam digest FILE... -o {folder}")
            name = folder.with_suffix(".mgam")
            how = "FILE... -o NAME.mgam" if name == folder else f"{folder} -o {name}"
            raise DigestError(f"{folder} is not a folder; a digest is made with: mgam digest {how}")
        if not (folder / NAME).is_symlink() and not (folder / NAME).exists():
            raise DigestError(f"{folder} is not a digest: it holds no {NAME}")
        return cls.parse(files.read_small(folder, NAME, MOST_BYTES), folder)

    @classmethod
    def parse(cls, data: bytes, folder: Path) -> Manifest:
        """The manifest in these bytes; `folder` is for words."""
        try:
            found = json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DigestError(f"{folder / NAME} is damaged: it is not JSON") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise DigestError(f"{folder} is not a digest: its {NAME} is of another program")
        version = found.get("version")
        if type(version) is not int or version != VERSION:
            older = isinstance(version, int) and version < VERSION
            raise DigestError(
                f"{folder} has format {version!r}, this mgam reads {VERSION}: {_OLDER if older else _NEWER}"
            )
        checksum = found.pop("checksum", None)
        if checksum != _checksum(found) or _canonical({**found, "checksum": checksum}) != data:
            raise DigestError(f"{folder / NAME} is damaged: its checksum does not fit; make the digest again")
        try:
            manifest = _from(found)
            _check(manifest)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SettingError) as error:
            raise DigestError(f"{folder / NAME} cannot be right: {error}") from error
        return manifest


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, ensure_ascii=True) + "\n").encode()


def _checksum(body: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(_canonical(body)).hexdigest()
    except RecursionError:
        return ""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _from(found: dict[str, Any]) -> Manifest:
    known = [
        "format", "version", "complete", "tokens", "model", "tokenizer", "shape", "settings", "dense_until", "call",
        "grid", "texts", "segments", "made_with",
    ]  # fmt: skip
    if list(found) != known:
        raise ValueError(f"its fields are {', '.join(found)[:200]}")
    shape = dict(found["shape"])
    levels = Levels(
        tuple(_whole(size, 1 << 32) for size in shape["levels"]["sizes"]), _whole(shape["levels"]["search"], 1 << 20)
    )
    return Manifest(
        model=found["model"],
        tokenizer=_word(found["tokenizer"]),
        shape=Shape(**{**shape, "levels": levels}),
        settings=Settings().with_(**found["settings"]),
        dense_until=_whole(found["dense_until"], MOST_TOKENS),
        call=_whole(found["call"], 1 << 30),
        grid=_whole(found["grid"], 1 << 30),
        tokens=_whole(found["tokens"], MOST_TOKENS),
        texts=tuple(
            Text(_word(t["name"]), _word(t["file"]), _whole(t["bytes"], 1 << 40), _word(t["sha256"]))
            for t in found["texts"]
        ),
        segments=tuple(
            Segment(
                _word(s["file"]), _whole(s["first"], MOST_TOKENS), _whole(s["tokens"], MOST_TOKENS), _word(s["sha256"])
            )
            for s in found["segments"]
        ),
        complete=found["complete"],
        made_with={_word(key): _word(value) for key, value in found["made_with"].items()},
    )


def _check(manifest: Manifest) -> None:
    """What no manifest of ours can hold."""
    shape, grid = manifest.shape, manifest.grid
    for name, value, most in (
        ("layers", shape.layers, 1 << 12), ("heads", shape.heads, 1 << 16), ("dim", shape.dim, 1 << 16),
        ("query_heads", shape.query_heads, 1 << 16),
    ):  # fmt: skip
        if _whole(value, most) < 1:
            raise ValueError(f"{name} is {value}")
    if _whole(shape.recent, 1 << 24) < 0 or shape.dtype not in CODES or shape.bits not in (8, *_bits(shape.dtype)):
        raise ValueError(f"pages of {shape.bits} bits of {shape.dtype}")
    if not isinstance(manifest.complete, bool):
        raise ValueError("complete is neither true nor false")
    if {*manifest.model} != {"name", "fingerprint"} or not all(
        isinstance(word, str) for word in manifest.model.values()
    ):
        raise ValueError("the model has no name and fingerprint")
    if not manifest.call or not grid or grid % step_of(manifest.settings, manifest.call):
        raise ValueError(f"segments of {grid} tokens do not fit calls, blocks and chunks")
    if manifest.settings.pyramid_levels != shape.levels:
        raise ValueError("levels stand there twice and differ")
    if not manifest.texts or not manifest.tokens:
        raise ValueError("it holds no text")
    for number, text in enumerate(manifest.texts):
        if text.file != Text.file_of(number):
            raise ValueError(f"text {number} is in {text.file!r}, and can be in {Text.file_of(number)} only")
    first = 0
    for number, segment in enumerate(manifest.segments):
        last = number == len(manifest.segments) - 1 and manifest.complete
        if segment.first != first or not 0 < segment.tokens <= grid or (segment.tokens < grid and not last):
            raise ValueError(f"segment {number} starts at {segment.first} with {segment.tokens} tokens")
        if segment.file != Segment.file_of(number, segment.tokens, grid):
            raise ValueError(f"segment {number} is in {segment.file!r}, which is not its name")
        first += segment.tokens
    if first > manifest.tokens or manifest.complete != (first == manifest.tokens):
        raise ValueError(f"{first} of {manifest.tokens} tokens are there")


def _bits(dtype: str) -> tuple[int, ...]:
    return {"float64": (64,), "float32": (32,)}.get(dtype, (16,))


def step_of(settings: Settings, call: int) -> int:
    """The grid of segments: what call, block and the largest chunk all divide."""
    return math.lcm(call, settings.block, settings.pyramid_levels.sizes[-1])


def _whole(value: Any, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:40]!r} is not a number from 0 to {most}")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not a text")
    return value

"""The layout of a segment file: which tensor stands where.

It follows from the digest's shape and the number of tokens alone. A header is never parsed: it must equal, byte for
byte, the one that the manifest calls for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mgam.levels import Levels

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U32": 4, "U8": 1, "I8": 1}
"""Bytes of safetensors' number formats."""
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""torch's names of number formats and safetensors'."""


@dataclass(frozen=True)
class Shape:
    """What all segments of a digest have in common."""

    layers: int
    query_heads: int
    heads: int
    """KV heads."""
    dim: int
    dtype: str
    """Number format of keys and values, by torch's name."""
    levels: Levels
    recent: int
    """Last queries kept with each segment, for blocks whose votes reach back; 0 with lookahead=block."""
    bits: int
    """Bits of a number on disk: those of `dtype` (search keys: of `search_code`), or 8."""

    @property
    def page_bytes(self) -> int:
        """Bytes of keys and values of one chunk, in one layer and KV head."""
        numbers = 2 * self.levels.chunk * self.dim
        return numbers + 2 * self.dim * 2 if self.bits == 8 else numbers * SIZES[CODES[self.dtype]]

    @property
    def search_code(self) -> str:
        """Number format of search keys."""
        return "F64" if self.dtype == "float64" else "BF16"

    @property
    def resident_bytes_per_token(self) -> float:
        """Bytes that stay in memory for each token: summaries and search keys."""
        size, per_layer = SIZES[CODES[self.dtype]], self.heads * self.dim
        return self.layers * per_layer * (self._summaries * size + SIZES[self.search_code] / self.levels.search)

    @property
    def _summaries(self) -> float:
        """Numbers of summaries for each token, in a dimension of a KV head."""
        return sum(2 / length for length in self.levels.sizes[1:])

    @property
    def page_bytes_per_token(self) -> float:
        """Bytes of pages on disk for each token."""
        return self.layers * self.heads * (self.page_bytes + 4) / self.levels.chunk

    @property
    def disk_bytes_per_token(self) -> float:
        """All bytes on disk for each token, without its text; with 8 bits the steps of a segment come on top."""
        resident = self.resident_bytes_per_token
        if self.bits == 8:
            resident = self.layers * self.heads * self.dim * (self._summaries + 1 / self.levels.search)
        return resident + self.page_bytes_per_token + 4 + 4 + 16


@dataclass(frozen=True)
class Place:
    """A tensor in a file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.code]

    @property
    def end(self) -> int:
        return self.begin + self.bytes


@dataclass(frozen=True)
class Layout:
    """The tensors of a segment of `tokens` tokens. Its first token stands on the border of a chunk of every level.

    Resident tensors come first and are read when a digest is opened; pages come last and are read when they are chosen.
    """

    shape: Shape
    tokens: int

    @cached_property
    def chunks(self) -> int:
        """Complete chunks of level 1."""
        return self.tokens // self.shape.levels.chunk

    def _resident(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Names, formats and shapes, the widest numbers first so that each stands aligned."""
        s, n = self.shape, self.tokens
        code, layers = CODES[s.dtype], range(s.layers)
        found: list[tuple[str, str, tuple[int, ...]]] = [
            ("offsets", "I64", (n, 2)),
            ("ids", "I32", (n,)),
            ("texts", "I32", (n,)),
        ]
        found += [(f"layers.{i}.checks", "U32", (self.chunks, s.heads)) for i in layers]
        kept = [(f"{part}.{level}", n // size) for level, size in self._levels for part in ("keys", "values")]
        summaries = [(name, code, (s.heads, count, s.dim)) for name, count in kept]
        search = ("search", s.search_code, (s.heads, s.levels.search_per_chunk, self.chunks, s.dim))
        live = [
            ("rest", code, (2, s.heads, n % s.levels.chunk, s.dim)),
            ("recent", code, (s.query_heads, min(s.recent, n), s.dim)),
        ]
        groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[*summaries, *live], [search]]
        if s.bits == 8:
            steps = [(f"{name}.step", "BF16", (s.heads, s.dim)) for name in (*dict(kept), "search")]
            groups = [[*live], [*steps], [(name, "I8", dims) for name, _, dims in (*summaries, search)]]
        for group in groups:
            found += [(f"layers.{i}.{name}", kind, dims) for i in layers for name, kind, dims in group]
        return found

    @property
    def _levels(self) -> list[tuple[int, int]]:
        """Levels of summaries and their sizes."""
        return list(enumerate(self.shape.levels.sizes[1:], start=1))

    @cached_property
    def _built(self) -> tuple[bytes, dict[str, Place]]:
        s = self.shape
        page = (s.page_bytes,) if s.bits == 8 else (2, s.levels.chunk, s.dim)
        code = "U8" if s.bits == 8 else CODES[s.dtype]
        pages = [(f"layers.{i}.pages", code, (self.chunks, s.heads, *page)) for i in range(s.layers)]
        begin, relative = 0, {}
        for name, kind, dims in (*self._resident(), *pages):
            relative[name] = Place(kind, dims, begin)
            begin = relative[name].end
        table = {
            name: {"dtype": place.code, "shape": list(place.shape), "data_offsets": [place.begin, place.end]}
            for name, place in relative.items()
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **table}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        origin = 8 + len(text)
        places = {name: Place(place.code, place.shape, origin + place.begin) for name, place in relative.items()}
        return len(text).to_bytes(8, "little") + text, places

    @property
    def header(self) -> bytes:
        """The first bytes of the file."""
        return self._built[0]

    @property
    def places(self) -> dict[str, Place]:
        """Where each tensor stands."""
        return self._built[1]

    @cached_property
    def numbers_end(self) -> int:
        """First byte after the whole numbers: tokens and checksums of pages."""
        return self.places[f"layers.{self.shape.layers - 1}.checks"].end

    @cached_property
    def pages_begin(self) -> int:
        """First byte of the pages; all before it is read when a digest is opened."""
        return self.places["layers.0.pages"].begin

    @cached_property
    def bytes(self) -> int:
        """Size of the file."""
        return self.places[f"layers.{self.shape.layers - 1}.pages"].end

    def page(self, layer: int, chunk: int, head: int) -> int:
        """First byte of a page; `chunk` counts from the segment's first."""
        return self.places[f"layers.{layer}.pages"].begin + (chunk * self.shape.heads + head) * self.shape.page_bytes


@lru_cache(16)
def layout_of(shape: Shape, tokens: int) -> Layout:
    """The layout of a segment, made once."""
    return Layout(shape, tokens)

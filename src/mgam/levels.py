"""Levels: the granularities at which the past is kept."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mgam.errors import SettingError


@dataclass(frozen=True)
class Levels:
    """The chunk sizes of a pyramid, finest first, and the resolution of its search keys.

    Raises:
        SettingError: when the sizes do not start at 1, do not grow, or do not divide one another.
    """

    sizes: tuple[int, ...] = (1, 64, 1024)
    """Tokens per chunk at each level. Level 0 is tokens; 64 fetches well, 1024 keeps a far past small."""

    search: int = 4
    """Tokens per search key. Finding a needle needs about four tokens; coarser keys lose it."""

    def __post_init__(self) -> None:
        sizes = self.sizes
        if len(sizes) < 2 or sizes[0] != 1:
            raise SettingError(
                f"levels {sizes} must start with 1 (tokens) and name at least one chunk size, e.g. (1, 64, 1024)"
            )
        for fine, coarse in pairwise(sizes):
            if coarse <= fine or coarse % fine:
                raise SettingError(
                    f"levels {sizes}: {coarse} is not a larger multiple of {fine}; "
                    "each size must divide the next, e.g. (1, 64, 1024)"
                )
        if self.search < 1 or sizes[1] % self.search:
            raise SettingError(
                f"search keys of {self.search} tokens do not divide the chunk size {sizes[1]}; take a divisor, e.g. 4"
            )

    @property
    def chunk(self) -> int:
        """Tokens in a chunk of level 1, the unit in which tokens are opened."""
        return self.sizes[1]

    @property
    def top(self) -> int:
        """Index of the coarsest level."""
        return len(self.sizes) - 1

    @property
    def search_per_chunk(self) -> int:
        """Search keys in one chunk of level 1."""
        return self.chunk // self.search

    def ratio(self, level: int) -> int:
        """Chunks of `level - 1` in one chunk of `level`."""
        return self.sizes[level] // self.sizes[level - 1]

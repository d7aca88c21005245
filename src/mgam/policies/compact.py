"""Compact search keys: fewer dimensions and eight bits, at the resolution of single queries and four keys.

A softmax does not change when the same number is added to all of a query's logits, so the mean key is taken off first:
what is left is small where keys share a large offset, and rounds well. The basis is that of the principal components of
a row's first search keys, per KV head; it is a function of the prefix alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.kernels import FLOAT8, capability, installed, serve
from mgam.levels import Levels
from mgam.policies.asked import Asked
from mgam.policies.second_stream import begun
from mgam.pyramid import Pyramid

PEAK = 224.0
"""Where the largest calibrated number is put: half of what e4m3 can hold, for keys that come later."""


@dataclass(frozen=True)
class Compact:
    """How search keys are shortened."""

    dims: int = 64
    """Dimensions kept: half of a head's lose next to nothing, a quarter lose the needle."""
    bits: Literal[8, 16] = 8
    calibrate: int = 8192
    """Tokens that give the basis. Blocks decided before this position search the full keys."""

    def __post_init__(self) -> None:
        if self.dims < 16 or self.dims % 16:
            raise SettingError(f"dims={self.dims}: compact search keys take a multiple of 16 dimensions, at least 16")
        if self.bits not in (8, 16):
            raise SettingError(f"bits={self.bits}: compact search keys take 8 or 16 bits")
        if self.calibrate < 1:
            raise SettingError(f"calibrate={self.calibrate}: a basis needs at least one chunk of tokens")


@dataclass
class CompactKeys:
    """Compact search keys of a pyramid.

    Shapes: search (B, H, S, C, d) ordered by place first; basis (B, H, D, d); mean (B, H, D), and in the basis offset
    (B, H, d); step (B, H): a kept number times the step is a coordinate; half like basis, in the precision of search
    keys: what kernels multiply with.
    """

    search: Tensor
    basis: Tensor
    mean: Tensor
    offset: Tensor
    step: Tensor
    half: Tensor
    chunks: list[int]
    """Chunks of each row that were shortened; 0 before the row holds the tokens that give its basis."""
    _end: torch.cuda.Event | None = None
    """Where all this is made beside other work: the end of that."""

    @classmethod
    def of(cls, pyramid: Pyramid, levels: Levels, compact: Compact) -> CompactKeys:
        """The compact keys of all complete chunks; kept with the pyramid and extended as it grows."""
        kept, targets = cls._room(pyramid, levels, compact)
        kept.wait()
        if kept.chunks != targets:
            kept._make(pyramid, targets, compact.calibrate // levels.chunk)
        return kept

    @classmethod
    def ahead(cls, pyramid: Pyramid, levels: Levels, compact: Compact) -> CompactKeys:
        """The same, made beside what the device is asked next: `wait` for them before they or the pyramid are freed.
        `of` waits too."""
        kept, targets = cls._room(pyramid, levels, compact)
        kept.wait()
        if kept.chunks != targets:
            first = compact.calibrate // levels.chunk
            kept._end = begun(lambda: kept._make(pyramid, targets, first), kept.basis.device)
        return kept

    def wait(self) -> None:
        """Lets what the device is asked next wait for these keys."""
        if self._end is not None:
            torch.cuda.current_stream(self.basis.device).wait_event(self._end)
            self._end = None

    @classmethod
    def _room(cls, pyramid: Pyramid, levels: Levels, compact: Compact) -> tuple[CompactKeys, list[int]]:
        """What the pyramid keeps, with room for what is to be kept, and the chunks of each row that this is."""
        assert pyramid.search is not None
        kept = pyramid.derived.get(compact)
        if not isinstance(kept, CompactKeys):
            kept = _empty(pyramid, compact)
            pyramid.derived[compact] = kept
        targets = [length // levels.chunk if length >= compact.calibrate else 0 for length in pyramid.lengths]
        if max(targets) > kept.search.shape[3]:
            kept.wait()
            room = max(pyramid.search.shape[3], max(targets))
            wider = kept.search.new_empty(*kept.search.shape[:3], room, kept.search.shape[4])
            if any(kept.chunks):
                wider[:, :, :, : kept.search.shape[3]] = kept.search
            kept.search = wider
        return kept, targets

    def _make(self, pyramid: Pyramid, targets: list[int], first: int) -> None:
        """Bases of rows that have none yet, from their first chunks, and the keys of new chunks."""
        waiting = [row for row, target in enumerate(targets) if target and not self.chunks[row]]
        if len(waiting) == len(targets):
            self._calibrate(pyramid, slice(None), first)
        else:
            for row in waiting:
                self._calibrate(pyramid, slice(row, row + 1), first)
        self._extend(pyramid, targets)

    def _calibrate(self, pyramid: Pyramid, rows: slice, first: int) -> None:
        """Sets the bases of rows from their first chunks: the same however far the rows have grown since."""
        assert pyramid.search is not None
        keys, rounds = pyramid.search[rows, :, :, :first], self.search.dtype == torch.float8_e4m3fn
        basis, mean, offset = self.basis[rows], self.mean[rows], self.offset[rows]
        step, half = self.step[rows], self.half[rows]
        if keys.is_cuda and first and installed() and basis.dtype == torch.float32:
            from mgam.policies import basis_triton

            if basis_triton.serves(*basis.shape[2:]):
                basis_triton.calibrate(keys, basis, mean, offset, step, half, PEAK if rounds else 0.0)
                return
        seen = keys.to(basis.dtype).flatten(2, 3)
        if not first:
            seen = seen.new_zeros(*seen.shape[:2], 1, seen.shape[3])
        mean.copy_(seen.mean(2))
        centred = seen - mean[:, :, None]
        size = centred.abs().amax((2, 3), keepdim=True).clamp_min(1e-20)
        basis.copy_(principal((centred / size).transpose(2, 3) @ (centred / size), basis.shape[-1]))
        half.copy_(basis)
        offset.copy_((mean[:, :, None] @ basis)[:, :, 0])
        if rounds:
            step.copy_((centred @ basis).abs().amax((2, 3)).clamp_min(1e-20) / PEAK)

    def _extend(self, pyramid: Pyramid, targets: list[int]) -> None:
        assert pyramid.search is not None
        together = len({*zip(self.chunks, targets, strict=True)}) == 1
        for row in range(1 if together else len(targets)):
            rows = slice(None) if together else slice(row, row + 1)
            new = slice(self.chunks[row], targets[row])
            if new.start < new.stop:
                self._shorten(pyramid.search[rows, :, :, new], rows, self.search[rows, :, :, new])
        self.chunks = [max(pair) for pair in zip(self.chunks, targets, strict=True)]

    def _shorten(self, keys: Tensor, rows: slice, short: Tensor) -> None:
        """(B, H, S, n, D) into (B, H, S, n, d), rounded."""
        if self.on_device(keys):
            from mgam.policies.search_triton import shorten_keys

            shorten_keys(keys, self.half[rows], self.offset[rows], self.step[rows], short)
            return
        centred = keys.to(self.basis.dtype) - self.mean[rows, :, None, None]
        turned = torch.matmul(centred, self.basis[rows, :, None])
        short.copy_(rounded(turned / self.step[rows, :, None, None, None], self.search.dtype))

    def asked(self, queries: Tensor, live: Tensor, row: Tensor, visible: Tensor, scale: float) -> Asked:
        """The search over these keys. `queries` (N, H*G, V, D) as voters come."""
        if self.on_device(queries):
            from mgam.policies.search_triton import few, shorten_queries

            log2 = scale * math.log2(math.e)
            voters = queries.shape[1] // self.basis.shape[1] * queries.shape[2]
            if few(queries.shape[0], voters, self.search.shape[0]):
                folded = queries.reshape(queries.shape[0], self.basis.shape[1], voters, -1)
                return Asked(folded, self.step, live, self.search, row, visible, self.half, self.step, log2)
            short, factor = shorten_queries(queries, row, self.half, self.step, log2)
            return Asked(short, factor, live, self.search, row, visible)
        heads = self.basis.shape[1]
        folded = queries.reshape(queries.shape[0], heads, -1, queries.shape[-1])
        turned, factor = self.ask(folded, row)
        return Asked(turned, factor * (scale * math.log2(math.e)), live, self.search, row, visible)

    def on_device(self, states: Tensor) -> bool:
        """Whether kernels search these keys, and read all that tells blocks apart on the device."""
        half = states.dtype in (torch.float16, torch.bfloat16)
        return states.is_cuda and half and self.search.dtype == torch.float8_e4m3fn

    def ask(self, queries: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Queries in the basis, rounded like the keys, and the factor that turns their products into logits.

        Shapes: queries (N, H, M, D), row (N,); returns (N, H, M, d) and (N, H, M) float32.
        """
        basis = self.basis[row]
        turned = torch.matmul(queries.to(basis.dtype), basis).float()
        factor = self.step[row][..., None].float().expand(turned.shape[:3])
        if self.search.dtype == torch.float8_e4m3fn:
            size = turned.abs().amax(-1).clamp_min(1e-20) / PEAK
            return rounded(turned / size[..., None], self.search.dtype), factor * size
        return turned.to(self.search.dtype), factor.contiguous()


def principal(moments: Tensor, width: int, steps: int = 8) -> Tensor:
    """An orthonormal basis (..., D, width) of the leading directions of second moments (..., D, D).

    Orthogonal iteration in float64: only the span matters, and directions of nearly equal weight may mix.
    """
    dim = moments.shape[-1]
    wide = moments.to(torch.float64)
    size = wide.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-300) / dim
    eye = torch.eye(dim, dtype=torch.float64, device=moments.device)
    wide = wide / size + 1e-7 * eye
    basis = eye[:, :width].expand(*moments.shape[:-2], dim, width)
    for _ in range(steps if width < dim else 0):
        basis = torch.linalg.qr(wide @ basis).Q
    return basis.to(moments.dtype)


def rounded(states: Tensor, dtype: torch.dtype) -> Tensor:
    """States in `dtype`; eight bits saturate."""
    if dtype == torch.float8_e4m3fn:
        return states.float().clamp(-448.0, 448.0).to(dtype)
    return states.to(dtype)


def _empty(pyramid: Pyramid, compact: Compact) -> CompactKeys:
    assert pyramid.search is not None
    batch, heads, places, _, dim = pyramid.search.shape
    wide = pyramid.search.new_empty(0, dtype=torch.promote_types(pyramid.search.dtype, torch.float32))
    if compact.bits == 8 and serve(pyramid.keys[0]) and capability(pyramid.search.device) < FLOAT8:
        raise SettingError(
            "search_bits=8: kernels take eight bits on GPUs of compute capability "
            f"{'.'.join(map(str, FLOAT8))} or newer, and this one has "
            f"{'.'.join(map(str, capability(pyramid.search.device)))}; choose search_bits=16"
        )
    kept = torch.float8_e4m3fn if compact.bits == 8 else pyramid.search.dtype
    width = min(compact.dims, dim)
    return CompactKeys(
        search=pyramid.search.new_empty(batch, heads, places, 0, width, dtype=kept),
        basis=wide.new_zeros(batch, heads, dim, width),
        mean=wide.new_zeros(batch, heads, dim),
        offset=wide.new_zeros(batch, heads, width),
        half=pyramid.search.new_zeros(batch, heads, dim, width),
        step=wide.new_ones(batch, heads),
        chunks=[0] * batch,
    )

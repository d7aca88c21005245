"""Pages: keys and values of one chunk in one layer and KV head, as bytes; the unit that is fetched and checked.

With 8 bits a page holds a number in -127 ... 127 for each dimension of each token, and a step per dimension in
bfloat16.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgam.documents.store import rounding
from mgam.documents.store.layout import Shape


def encode(keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
    """Pages (C, H, page_bytes) uint8 of keys and values (H, C*chunk, D)."""
    chunk = shape.levels.chunk
    both = torch.stack([states.unflatten(1, (-1, chunk)).transpose(0, 1) for states in (keys, values)], 2)
    if shape.bits != 8:
        return both.contiguous().view(torch.uint8).flatten(2)
    numbers, step = rounding.small(both, 3)  # of (C, H, 2, chunk, D)
    return torch.cat((numbers.flatten(2).view(torch.uint8), step.flatten(2).view(torch.uint8)), 2)


def decode(pages: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Keys and values (n, chunk, D) of pages (n, page_bytes) uint8, on their device."""
    count, chunk, dim = pages.shape[0], shape.levels.chunk, shape.dim
    dtype: torch.dtype = getattr(torch, shape.dtype)
    if shape.bits != 8:
        both = pages.contiguous().view(dtype).view(count, 2, chunk, dim)
        return both[:, 0], both[:, 1]
    numbers = 2 * chunk * dim
    small = pages[:, :numbers].contiguous().view(torch.int8).view(count, 2, chunk, dim)
    step = pages[:, numbers:].contiguous().view(torch.bfloat16).view(count, 2, 1, dim)
    both = rounding.plain(small, step, dtype)
    return both[:, 0], both[:, 1]


def checksums(pages: Tensor) -> NDArray[np.uint32]:
    """CRC-32 of pages (..., page_bytes) uint8 on the CPU."""
    flat = pages.reshape(-1, pages.shape[-1]).numpy()
    return np.fromiter((zlib.crc32(page) for page in flat), np.uint32, len(flat)).reshape(pages.shape[:-1])

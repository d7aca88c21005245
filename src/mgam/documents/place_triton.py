"""Pages from pinned main memory straight into a pool on the GPU: one kernel reads them where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgam.kernels import cdiv, power_of_2


@triton.jit
def place_pages_kernel(
    page_ptr, table_ptr, key_ptr, value_ptr, count,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some words of one page's keys and values. `table_ptr`: pages (n,), then slots (n,)."""
    page = tl.load(table_ptr + tl.program_id(0))
    slot = tl.load(table_ptr + count + tl.program_id(0))
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = word < WORDS
    source = page_ptr + page * (2 * WORDS) + word
    key = tl.load(source, mask=mask)
    value = tl.load(source + WORDS, mask=mask)
    tl.store(key_ptr + slot * WORDS + word, key, mask=mask)
    tl.store(value_ptr + slot * WORDS + word, value, mask=mask)


def place_pages(pages: Tensor, index: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Copies pages to slots of a pool, without waiting for it.

    Shapes: pages (P, 2 * n) uint8, pinned on the CPU or on the device; index and slots (N,) int64 on the CPU; keys and
    values (slots, chunk, D), contiguous, of n bytes a slot.
    """
    count = len(index)
    if not count:
        return
    half = keys[0].numel() * keys.element_size()
    if pages.shape[1] != 2 * half or half % 8:
        raise ValueError(f"pages of {pages.shape[1]} bytes do not fit slots of two times {half}")
    table = torch.cat((index, slots)).to(keys.device)
    words = half // 8
    block = min(1024, power_of_2(words))
    place_pages_kernel[(count, cdiv(words, block))](
        pages.view(torch.int64), table, keys.view(torch.int64), values.view(torch.int64), count,
        WORDS=words, BLOCK=block, num_warps=4,
    )  # fmt: skip

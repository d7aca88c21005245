"""Blocks of one new token per row, told by lengths that only the device knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgam.levels import Levels


@dataclass(frozen=True)
class Now:
    """One new token per row, the last of `lengths` (B,), and the tables that tell the kernels of a call about it.

    What is in the tables counts once they are written: by the first kernel of a search, which has time for it, or by
    `write`.
    """

    lengths: Tensor
    window: int
    levels: Levels
    table: Tensor
    """(5, B) int64: row, start, length, window start, and chunks that may be judged."""
    live: Tensor
    """(B, 1) uint8 ones: who votes."""
    tickets: Tensor
    """(B, H) int32 zeros, for parts of a cover that are read at the same time."""

    @classmethod
    def of(cls, lengths: Tensor, window: int, levels: Levels, heads: int) -> Now:
        """Tables of rows with H KV heads, that nobody has written yet."""
        batch, device = lengths.shape[0], lengths.device
        table = torch.empty(5, batch, dtype=torch.int64, device=device)
        live = torch.empty(batch, 1, dtype=torch.uint8, device=device)
        tickets = torch.empty(batch, heads, dtype=torch.int32, device=device)
        return cls(lengths.contiguous(), window, levels, table, live, tickets)

    def write(self) -> Now:
        """Writes the tables, in a launch of its own."""
        batch, heads = self.tickets.shape
        now_kernel[(batch * heads,)](
            self.lengths, self.table, self.live, self.tickets, batch, heads, WINDOW=self.window,
            CHUNK=self.levels.chunk, num_warps=1,
        )  # fmt: skip
        return self


@triton.jit(do_not_specialize=["blocks", "heads"], do_not_specialize_on_alignment=["length_ptr"])
def now_kernel(
    length_ptr, table_ptr, live_ptr, ticket_ptr, blocks, heads, WINDOW: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The tables of `Now`: one program per block and head."""
    pid = tl.program_id(0)
    tell(length_ptr, table_ptr, live_ptr, ticket_ptr, pid // heads, pid % heads, blocks, heads, True, WINDOW, CHUNK)


@triton.jit
def tell(
    length_ptr, table_ptr, live_ptr, ticket_ptr, block, head, blocks, heads, writes,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Chunks of a block that may be judged; of all programs of a block and head the one that `writes` writes what the
    tables hold of these."""
    last = tl.load(length_ptr + block).to(tl.int64) - 1
    one = block * 0 + 1
    tl.store(ticket_ptr + block * heads + head, block * 0, mask=writes)
    first = writes & (head == 0)
    tl.store(table_ptr + block, block.to(tl.int64), mask=first)
    tl.store(table_ptr + blocks + block, last, mask=first)
    tl.store(table_ptr + 2 * blocks + block, one.to(tl.int64), mask=first)
    tl.store(table_ptr + 3 * blocks + block, tl.maximum(last - WINDOW + 1, 0) // CHUNK * CHUNK, mask=first)
    tl.store(table_ptr + 4 * blocks + block, last // CHUNK, mask=first)
    tl.store(live_ptr + block, one.to(tl.uint8), mask=first)
    return (last // CHUNK).to(tl.int32)

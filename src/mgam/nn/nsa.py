"""Native sparse attention: compressed blocks, selected blocks and a window (Yuan et al. 2025, arXiv 2502.11089)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mgam.errors import SettingError
from mgam.merge import Part, merge
from mgam.nn.base import Seen, SelfAttention, State, above, last, longer
from mgam.nn.sparse import by_blocks, by_lists, over_entries, slices, spans

BLOCK = 64
"""Queries that gather their window together; it changes nothing in the result."""
BRANCHES = ("compressed", "selected", "window")


class NativeSparseAttention(SelfAttention):
    """Three branches, each with keys and values of its own.

    A compressed block of `length` tokens begins every `stride` tokens and may be read from its last token on. The
    probabilities of those that overlap a selection block of `select` tokens are summed, over the heads of a group too,
    and choose `blocks` selection blocks, among them the first, the query's own and the one before. A query that may
    read nothing in a branch gets zeros there.

    Args:
        fusion: `gates`: three softmaxes, each times a gate from the hidden state (the paper). `one`: one softmax over
            all that the branches read, what they share counted as often as it is read.
    """

    BIDIRECTIONAL = False

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        length: int = 32,
        stride: int = 16,
        select: int = 64,
        blocks: int = 16,
        window: int = 512,
        fusion: Literal["gates", "one"] = "gates",
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        above("stride", stride, 1)
        above("length", length, 1)
        above("select", select, 1)
        above("window", window, 1)
        above("blocks", blocks, 3)
        if length % stride or select % stride:
            raise SettingError(f"stride={stride} must divide length={length} and select={select}")
        if fusion not in ("gates", "one"):
            raise SettingError(f"fusion={fusion!r} is unknown; choose gates or one")
        self.length, self.stride, self.select, self.blocks = length, stride, select, blocks
        self.window, self.fusion = window, fusion
        size = self.kv_heads * self.dim
        self.branches = nn.ModuleDict(
            {name: nn.Linear(width, 2 * size, bias=False) for name in ("compressed", "window")}
        )
        self.place = nn.Parameter(torch.randn(2, length, self.dim) * 0.02)
        self.squeeze = nn.ModuleList(
            nn.Sequential(nn.Linear(length * self.dim, self.dim), nn.GELU(), nn.Linear(self.dim, self.dim))
            for _ in range(2)
        )
        if fusion == "gates":
            self.gates = nn.Linear(width, 3 * heads)
            nn.init.zeros_(self.gates.weight)
            with torch.no_grad():
                self.gates.bias.copy_(torch.tensor([-2.0, -2.0, 2.0]).repeat(heads))

    def copy_projections(self) -> None:
        """Makes the keys and values of the other two branches copies of the ordinary ones."""
        parts: list[Any] = [self.key, self.value]
        for name in self.branches:
            made = nn.Linear(self.width, 2 * self.kv_heads * self.dim, bias=parts[0].bias is not None)
            made.to(parts[0].weight)
            with torch.no_grad():
                made.weight.copy_(torch.cat([part.weight for part in parts]))
                if made.bias is not None:
                    made.bias.copy_(torch.cat([part.bias for part in parts]))
            self.branches[name] = made

    def extra(self, states: Tensor, q: Tensor, first: int) -> dict[str, Tensor]:
        """Keys and values of the other two branches."""
        found: dict[str, Tensor] = {}
        for name, projection in self.branches.items():
            k, v = self.split(projection(states)).chunk(2, 1)
            found |= {f"{name}_k": self.turned(k, first), f"{name}_v": v}
        return found

    def known(self, q: Tensor, new: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        """Keys and values of each branch, and compressed blocks, each made once, as its last token comes."""
        known = super().known(q, new, state)
        for number, name in enumerate(("k", "v")):
            states = known[f"compressed_{name}"]  # from the first token of the next block on
            if states.shape[2] >= self.length:
                known[f"block_{name}"] = longer(known.get(f"block_{name}"), self.compressed(number, states))
        return known

    def keep(self, known: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Keys and values of all tokens, which may be selected; of those in the window; of those to be compressed."""
        made = known["block_k"].shape[2] if "block_k" in known else 0
        rest = {"compressed": tokens - made * self.stride, "window": self.window - 1}
        return known | {
            f"{name}_{kind}": last(known[f"{name}_{kind}"], count) for name, count in rest.items() for kind in "kv"
        }

    def compressed(self, number: int, states: Tensor) -> Tensor:
        """Keys (0) or values (1) (B, K, N, D) of the complete blocks, the first of which begins at the first token."""
        pieces = states.unfold(2, self.length, self.stride).transpose(-1, -2) + self.place[number]
        return self.squeeze[number](pieces.flatten(3))

    def attend(self, seen: Seen) -> Tensor:
        """The three branches, fused."""
        tokens, own, device = seen.k.shape[2], seen.own, seen.q.device
        k, v = seen.more["window_k"], seen.more["window_v"]
        first, block = k.shape[2] - len(own), min(BLOCK, len(own))
        index = spans(first, len(own), block, min(self.window, k.shape[2]), 0, device)

        def near(query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query - key < self.window)

        parts = [by_blocks(seen.q, k, v, first, block, index, near, self.scale)]
        compressed = seen.more.get("block_k")
        if compressed is not None:
            parts.insert(0, over_entries(seen.q, compressed, seen.more["block_v"], self.complete(own), self.scale))
        selected = []
        step = slices(seen.q, max(tokens // self.stride, self.blocks * self.select))
        for low in range(0, len(own), step):
            q = seen.q[:, :, low : low + step]
            with torch.no_grad():
                asked = None if compressed is None else self.probabilities(q, compressed, own[low : low + step])
                lists = self.selection(asked, own[low : low + step], tokens, len(q))
            selected.append(by_lists(q, seen.k, seen.v, seen.first + low, lists, self.scale))
        out, lse = (torch.cat([getattr(part, name) for part in selected], 2) for name in ("out", "lse"))
        parts.insert(-1, Part(out, lse))
        if self.fusion == "one":
            return merge(parts).out
        gates = torch.sigmoid(self.gates(seen.states)).unflatten(2, (self.heads, 3)).permute(3, 0, 2, 1)[..., None]
        outs = [part.out for part in parts]
        return sum(gate * out for gate, out in zip(gates[3 - len(outs) :], outs, strict=True))

    def complete(self, own: Tensor) -> Tensor:
        """Compressed blocks that a query may read: those that ended."""
        return ((own - self.length + 1) // self.stride + 1).clamp_min(0)

    def probabilities(self, q: Tensor, compressed: Tensor, own: Tensor) -> Tensor:
        """Softmax weights (B, K, L, N) of compressed blocks, summed over the heads of a group."""
        legal = torch.arange(compressed.shape[2], device=q.device) < self.complete(own)[:, None]
        logits = self.scale * q.unflatten(1, (self.kv_heads, -1)) @ compressed[:, :, None].transpose(-1, -2)
        return torch.softmax(logits.masked_fill(~legal, -torch.inf), -1).nan_to_num(0.0).sum(2)

    def selection(self, probabilities: Tensor | None, own: Tensor, tokens: int, rows: int) -> Tensor:
        """Tokens (B, K, L, M) of the chosen blocks; `probabilities` (B, K, L, N) are those of compressed blocks."""
        count = -(-tokens // self.select)
        scores = torch.zeros(rows, self.kv_heads, len(own), count, device=own.device)
        if probabilities is not None:
            for weight_of, shift in _overlaps(self.select // self.stride, self.length // self.stride):
                place = torch.arange(count, device=own.device) * (self.select // self.stride) + shift
                there = (place >= 0) & (place < probabilities.shape[3])
                picked = probabilities[..., place.clamp(0, probabilities.shape[3] - 1)]
                scores = scores + weight_of * (picked * there).float()
        block, mine = torch.arange(count, device=own.device), own[:, None] // self.select
        always = (block == 0) | (block == mine) | (block == mine - 1)
        scores = scores.masked_fill(always, torch.inf).masked_fill(block > mine, -torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True)
        chosen = best.indices.masked_fill(best.values == -torch.inf, -1)[..., : self.blocks]
        index = chosen[..., None] * self.select + torch.arange(self.select, device=own.device)
        return index.masked_fill((chosen[..., None] < 0) | (index >= tokens), -1).flatten(3)


def _overlaps(wide: int, long: int) -> list[tuple[int, int]]:
    """How often compressed block `wide` * j + shift counts for selection block j: (times, shift)."""
    shifts = [m - n for m in range(wide) for n in range(long)]
    return [(shifts.count(shift), shift) for shift in sorted(set(shifts))]

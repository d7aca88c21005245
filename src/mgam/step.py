"""One new token per row, as the engine reads it: the kernels of `mgam.device`, captured in a CUDA graph and replayed.

Launching these kernels one by one takes the host far longer than they run. A pyramid keeps the captured call of its
layer from token to token, until what the kernels read lies elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mgam.cover import Cover, Known
from mgam.cover import window_start as first_of_window
from mgam.device import Decoded, decode
from mgam.policies.compact import CompactKeys
from mgam.policies.scored import Scored
from mgam.policies.search_triton import most_entries
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, sent


@dataclass(frozen=True)
class Moment:
    """Where the rows of a call stand that has one new token for each; the same for all layers."""

    lengths: Tensor
    """(B,) on the device, the token included."""
    begin: Tensor
    """(B,) on the CPU: first token of each window."""
    judged: int
    """Complete chunks before the last token of any row."""
    full: bool
    """Whether every row searches full keys, for want of the tokens that give compact ones a basis."""

    @classmethod
    def of(cls, blocks: Blocks, policy: Scored, pyramid: Pyramid) -> Moment | None:
        """None where rows would search in two ways, or where nothing lies before any window."""
        levels, device = pyramid.levels, pyramid.keys[0].device
        begin = first_of_window(blocks.decide, policy.window, levels)
        late = torch.zeros(len(blocks)) if policy.compact is None else blocks.decide >= policy.compact.calibrate
        if not int(begin.max()) or bool(late.any()) != bool(late.all()):
            return None
        judged = int(blocks.decide.max()) // levels.chunk
        return cls(sent(blocks.stop, device), begin, judged, not bool(late.any()))


def moment(blocks: Blocks, policy: Scored, pyramid: Pyramid) -> Moment | None:
    """`Moment.of`, worked out once for the layers of a call."""
    key = ("moment", policy.window, policy.compact, pyramid.levels, pyramid.keys[0].device)
    return blocks.once(key, lambda: Moment.of(blocks, policy, pyramid))


def read(
    queries: Tensor,
    now: Moment,
    pyramid: Pyramid,
    policy: Scored,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
    watched: bool = False,
) -> tuple[Tensor, Cover, Tensor | None]:
    """Attention (B, H*G, 1, D) of one new token per row, the cover that it read, and, where it is `watched`, the
    attention (B, H, K) that opened chunks got.

    Cover and attention to chunks are written over by the next call over the same pyramid.

    Raises:
        SettingError: when the cover does not fit the positions.
    """
    levels = pyramid.levels
    chunks = int(now.begin.max()) // levels.chunk
    entries = most_entries(chunks, policy.budget // levels.chunk, levels, policy.rest)
    if positions.kind == "granular":
        positions.check(entries)
    read_from: list[Tensor] = [*pyramid.keys, *pyramid.values]
    assert pyramid.search is not None
    room = pyramid.search.shape[3]
    if policy.compact is None or now.full:
        read_from.append(pyramid.search)
    else:
        short = CompactKeys.of(pyramid, levels, policy.compact)
        read_from += [short.search, short.basis, short.step]
    # As many chunks as a power of two: the call stays the same while the text grows.
    bound = min(room, 1 << now.judged.bit_length())
    places = tuple((states.data_ptr(), states.shape) for states in read_from)
    same = (policy, positions, scale, softcap, watched, bound, places, queries.shape, queries.dtype, queries.device)

    def call(asked: Tensor, lengths: Tensor) -> Decoded:
        return decode(asked, lengths, pyramid, policy, positions, scale, chunks=bound, softcap=softcap, watched=watched)

    if not isinstance(pyramid.step, Step):
        pyramid.step = Step()
    made, out = pyramid.step(same, call, queries, now.lengths)
    return out, replace(made.cover, known=Known(now.begin, entries)), made.mass


class Step:
    """A call that is captured when it is made a second time, and replayed from then on."""

    def __init__(self) -> None:
        self._same: object = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, Tensor] | None = None
        self._made: Decoded | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        """A copy reads other memory, and so begins anew."""
        return Step()

    def __reduce__(self) -> tuple[type[Step], tuple[()]]:
        return Step, ()

    def __call__(self, same: object, call: Any, queries: Tensor, lengths: Tensor) -> tuple[Decoded, Tensor]:
        """What `call(queries, lengths)` gives, and a result that nobody writes to again. `same`: what tells this call
        from others, all places that it reads from included."""
        if not queries.is_cuda or torch.cuda.is_current_stream_capturing():
            made = call(queries, lengths)
            return made, made.out
        if same != self._same:
            self._same, self._graph, self._given, self._made = same, None, None, None
            made = call(queries, lengths)
            return made, made.out
        if self._graph is None:
            self._given = queries.clone(memory_format=torch.contiguous_format), lengths.clone()
            self._graph, self._made = _captured(call, *self._given)
        else:
            assert self._given is not None
            self._given[0].copy_(queries)
            self._given[1].copy_(lengths)
        self._graph.replay()
        assert self._made is not None
        return self._made, self._made.out.clone()


def _captured(call: Any, queries: Tensor, lengths: Tensor) -> tuple[torch.cuda.CUDAGraph, Decoded]:
    """The call in a graph that reads from these tensors. Graphs share their working memory, since the layers of a
    model follow one another in a stream."""
    here = torch.cuda.current_stream(queries.device)
    side, pool, _ = _aside(queries.device, here.cuda_stream)
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        call(queries, lengths)  # kernels are loaded before the capture begins, in which nothing may be loaded
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            made = call(queries, lengths)
        finally:
            graph.capture_end()
    here.wait_stream(side)
    return graph, made


@cache
def _aside(device: torch.device, stream: int) -> tuple[torch.cuda.Stream, Any, torch.cuda.CUDAGraph]:
    """A stream to capture on and a pool of memory, for the calls that follow one another in a stream of a device; and
    a graph that keeps the pool while no other does."""
    side, pool, graph = torch.cuda.Stream(device), torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    some = torch.zeros(1, device=device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        some.add_(1)
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        some.add_(1)
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(side)
    return side, pool, graph

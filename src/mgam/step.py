"""One new token per row, as the engine reads it: the kernels of `mgam.device`, captured in a CUDA graph and replayed.

Launching these kernels one by one takes the host far longer than they run. A pyramid keeps the captured call of its
layer from token to token, until what the kernels read lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.runtime import driver

from mgam.arguments_triton import Arguments
from mgam.cover import Cover, Known
from mgam.cover import window_start as first_of_window
from mgam.device import Decoded, decode
from mgam.lasting import lasting
from mgam.levels import Levels
from mgam.policies.compact import CompactKeys
from mgam.policies.scored import Scored
from mgam.policies.search_triton import most_entries
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, sent

Made = TypeVar("Made")
Call = Callable[[Tensor, Tensor, Tensor | None], Decoded]
"""From queries, lengths, and the address of the result, where it goes elsewhere than into a tensor of the call."""


@dataclass(frozen=True, eq=False)
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
    _entries: dict[tuple[int, int], tuple[Scored, Positions, int]] = field(default_factory=dict)
    """By which objects they are, which is found faster than what they hold; the objects are kept so that they last."""

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

    def entries(self, policy: Scored, positions: Positions, levels: Levels) -> int:
        """Most entries before a window; found and checked once for layers that share policy and positions.

        Raises:
            SettingError: when so many do not fit the positions.
        """
        key = id(policy), id(positions)
        if key not in self._entries:
            chunks = int(self.begin.max()) // levels.chunk
            found = most_entries(chunks, policy.budget // levels.chunk, levels, policy.rest)
            if positions.kind == "granular":
                positions.check(found)
            self._entries[key] = policy, positions, found
        return self._entries[key][2]


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
) -> Stepped:
    """Attention of one new token per row; where it is `watched`, that of opened chunks is summed too.

    Raises:
        SettingError: when the cover does not fit the positions.
    """
    levels = pyramid.levels
    entries = now.entries(policy, positions, levels)
    read_from: list[Tensor] = [*pyramid.keys, *pyramid.values]
    assert pyramid.search is not None
    room = pyramid.search.shape[3]
    if policy.compact is None or now.full:
        read_from.append(pyramid.search)
    else:
        short = CompactKeys.of(pyramid, levels, policy.compact)
        read_from += [short.search, short.half, short.step]
    # As many chunks as a power of two: the call stays the same while the text grows.
    bound = min(room, 1 << now.judged.bit_length())
    places = [states.data_ptr() for states in read_from], [states.shape for states in read_from]
    same = (policy, positions, scale, softcap, watched, bound, places, queries.shape, queries.dtype, queries.device)

    def call(asked: Tensor, lengths: Tensor, place: Tensor | None) -> Decoded:
        more = {"softcap": softcap, "watched": watched, "place": place}
        return decode(asked, lengths, pyramid, policy, positions, scale, chunks=bound, **more)  # type: ignore[arg-type]

    if not isinstance(pyramid.step, Step):
        pyramid.step = Step()
    made, out = pyramid.step(same, call, queries, now)
    return Stepped(out, made, Known(now.begin, entries))


@dataclass(frozen=True)
class Stepped:
    """What one new token per row read. Cover and masses are written over by the next call over the same pyramid."""

    out: Tensor
    """(B, H*G, 1, D)"""
    made: Decoded
    known: Known

    @property
    def cover(self) -> Cover:
        """The cover that was read."""
        return replace(self.made.cover, known=self.known)

    @property
    def mass(self) -> Tensor | None:
        """(B, H, K): the attention that opened chunks got, where it was watched."""
        return self.made.mass


class Step:
    """A call that is captured when it is made a second time, and replayed from then on."""

    def __init__(self) -> None:
        self._same: object = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._arguments: Arguments | None = None
        self._made: Decoded | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        """A copy reads other memory, and so begins anew."""
        return Step()

    def __reduce__(self) -> tuple[type[Step], tuple[()]]:
        return Step, ()

    def __call__(self, same: tuple[object, ...], call: Call, queries: Tensor, now: Moment) -> tuple[Decoded, Tensor]:
        """What `call(queries, lengths, None)` gives, and a result that nobody writes to again. `same`: what tells this
        call from others, all places that it reads from included."""
        if not queries.is_cuda or torch.cuda.is_current_stream_capturing():
            made = call(queries, now.lengths, None)
            return made, made.out
        stream = driver.active.get_current_stream(queries.device.index)  # torch's own takes 20 times as long
        if (stream, same) != self._same:
            self._same, self._graph, self._arguments, self._made = (stream, same), None, None, None
            made = call(queries, now.lengths, None)
            return made, made.out
        beside = _beside(queries.device, stream)
        lengths = beside.lengths_of(now)
        if self._graph is None or self._arguments is None or self._made is None:
            self._arguments = Arguments(queries)
            out = self._arguments.enter(queries, stream)
            self._graph, self._made = beside.captured(call, self._arguments, lengths)
        else:
            out = self._arguments.enter(queries, stream)
        self._graph.replay()
        return self._made, out


class Beside:
    """What the captured calls of a stream share: a stream to capture on; working memory, since the layers of a model
    follow one another; and the lengths of the rows, which are the same for all of them."""

    def __init__(self, device: torch.device) -> None:
        self._aside, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._lengths: dict[int, tuple[Tensor, Moment]] = {}
        some = torch.zeros(1, device=device)
        self._keeps = self._capture(lambda: some.add_(1))[0]  # a pool must not be without a graph in between

    def lengths_of(self, now: Moment) -> Tensor:
        """Lengths (B,), at one place for each number of rows; written when another moment's stand there."""
        rows = now.lengths.shape[0]
        if rows not in self._lengths:
            with lasting():
                self._lengths[rows] = now.lengths.clone(), now
        place, owner = self._lengths[rows]
        if owner is not now:
            place.copy_(now.lengths)
            self._lengths[rows] = place, now
        return place

    def captured(self, call: Call, arguments: Arguments, lengths: Tensor) -> tuple[torch.cuda.CUDAGraph, Decoded]:
        """The call in a graph that reads from these tensors, and writes where the arguments say."""
        return self._capture(lambda: call(arguments.queries, lengths, arguments.place))

    def _capture(self, call: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
        here, graph = torch.cuda.current_stream(self._aside.device), torch.cuda.CUDAGraph()
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside):
            call()  # kernels are loaded before the capture begins, in which nothing may be loaded
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = call()
            finally:
                graph.capture_end()
        here.wait_stream(self._aside)
        return graph, made


@cache
def _beside(device: torch.device, stream: int) -> Beside:
    return Beside(device)

"""The dispatcher: picks a backend by device and shape, and says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from mgam.attend import blockwise, reference
from mgam.cover import Cover
from mgam.errors import SettingError
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

Attend = Callable[..., Tensor]
"""As `attend`, less the choice; a backend may write its result to `out` or not, and returns what holds it."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and the reason."""

    backend: str
    reason: str
    run: Attend


@dataclass(frozen=True)
class Backend:
    """A way to attend. `refuse` lists every reason why it cannot serve the queries (none: it can)."""

    name: str
    run: Attend
    refuse: Callable[[Tensor], list[str]]
    automatic: bool
    """Whether it may be picked when nobody asked for it."""


def _triton(*args: object, out: Tensor | None) -> Tensor:
    from mgam.attend.triton import backend

    return backend.attend(*args, out=out)  # type: ignore[arg-type, misc]


def _torch(*args: object, out: Tensor | None) -> Tensor:
    return blockwise.attend(*args)  # type: ignore[arg-type]


def _refuse_triton(queries: Tensor) -> list[str]:
    from mgam.attend.triton import backend

    return backend.refuse(queries)


def _oracle(*args: object, out: Tensor | None) -> Tensor:
    return reference.attend(*args).out  # type: ignore[arg-type]


BACKENDS: dict[str, Backend] = {
    "triton": Backend("triton", _triton, _refuse_triton, automatic=True),
    "torch": Backend("torch", _torch, lambda queries: [], automatic=True),
    "reference": Backend("reference", _oracle, lambda queries: [], automatic=False),
}
"""All backends, best first."""


def check_name(backend: str | None) -> None:
    """Refuses a name that no backend has.

    Raises:
        SettingError: with the names that there are.
    """
    if backend is not None and backend not in BACKENDS:
        raise SettingError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")


def serving(queries: Tensor, pyramid: Pyramid, backend: str | None = None) -> str:
    """Name of the backend that `attend` would run.

    Raises:
        SettingError: as `choose` does.
    """
    if not pyramid.in_memory:
        _check_digest(backend)
    for one in BACKENDS.values() if backend is None else ():
        if one.automatic and not _refused(one.name, queries):
            return one.name
    return choose(queries, backend).backend


def choose(queries: Tensor, backend: str | None = None) -> Choice:
    """The backend for these queries: the one asked for, or the first that can.

    Raises:
        SettingError: when the backend asked for is unknown or cannot serve, with every reason.
    """
    check_name(backend)
    if backend is not None:
        reasons = _refused(backend, queries)
        if reasons:
            raise SettingError(f"backend {backend!r} cannot serve {_say(queries)}: {'; '.join(reasons)}")
        return Choice(backend, "asked for", BACKENDS[backend].run)
    passed_over: list[str] = []
    for candidate in BACKENDS.values():
        reasons = _refused(candidate.name, queries)
        if candidate.automatic and not reasons:
            why = f"first that serves {_say(queries)}"
            return Choice(candidate.name, "; ".join([why, *passed_over]), candidate.run)
        if candidate.automatic:
            passed_over.append(f"{candidate.name}: {', '.join(reasons)}")
    raise SettingError(f"no backend serves {_say(queries)}: {'; '.join(passed_over)}")


def attend(
    queries: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of N query blocks over their covers. Shapes: queries and result (N, Hq, Q, D).

    `out`, of the result's shape and any strides but the last, is where the result may be written, without gradients;
    it is returned where that was done.
    """
    if _gathers(cover, pyramid, backend):
        return blockwise.attend(queries, blocks, cover, pyramid, positions, scale, softcap)
    name, given = serving(queries, pyramid, backend), (pyramid, positions, scale, softcap)
    run = BACKENDS[name].run
    group = cover.opened.shape[1] // pyramid.keys[0].shape[1]
    if group == 1 or name != "triton":
        return run(queries, blocks, cover, *given, out=out)
    # A kernel loads each KV head once for all that share a cover: here for one query head of each group.
    parts = [
        run(queries[:, member::group], blocks, _of_heads(cover, slice(member, None, group)), *given, out=None)
        for member in range(group)
    ]
    return torch.stack(parts, 2).flatten(1, 2)


def watched(
    queries: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attend`, and the attention mass (N, H, K) of each opened chunk, summed over the block's queries and the
    group's heads. For evidence and pictures: call it for a few blocks only."""
    given = queries, blocks, cover, pyramid, positions, scale, softcap
    if _gathers(cover, pyramid, backend):
        return blockwise.watched(*given)
    runs = choose(queries, backend).backend
    if runs == "torch":
        return blockwise.watched(*given)
    if runs == "triton" and cover.opened.shape[1] == pyramid.keys[0].shape[1] and not torch.is_grad_enabled():
        from mgam.attend.triton import backend as kernels

        return kernels.watched(*given)
    return attend(*given, backend), blockwise.masses(*given)


def _gathers(cover: Cover, pyramid: Pyramid, backend: str | None) -> bool:
    """Whether a digest is read by PyTorch whatever could serve the queries: where it is asked to, densely, or by a
    cover for each query head."""
    if pyramid.in_memory:
        return False
    _check_digest(backend)
    return backend == "torch" or cover.is_dense or cover.opened.shape[1] != pyramid.keys[0].shape[1]


def _check_digest(backend: str | None) -> None:
    if backend == "reference":
        raise SettingError("backend 'reference' cannot read a digest; choose 'torch', or leave it out")


def _of_heads(cover: Cover, some: slice) -> Cover:
    """What some of the heads read."""
    return replace(
        cover,
        opened=cover.opened[:, some],
        summaries=tuple(index[:, some] for index in cover.summaries),
        placed=None,
    )


def _refused(name: str, queries: Tensor) -> tuple[str, ...]:
    return _reasons(name, queries.device, queries.dtype, queries.shape[-1])


@cache
def _reasons(name: str, device: torch.device, dtype: torch.dtype, dim: int) -> tuple[str, ...]:
    """Why a backend cannot serve; asked of the machine once."""
    return tuple(BACKENDS[name].refuse(torch.empty(0, dim, dtype=dtype, device=device)))


def _say(queries: Tensor) -> str:
    dtype = str(queries.dtype).removeprefix("torch.")
    return f"{dtype} queries of shape {tuple(queries.shape)} on {queries.device.type}"


def available() -> dict[str, list[str]]:
    """Each backend with the reasons why it cannot serve a plain half-precision call on the best device here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    return {name: backend.refuse(probe) for name, backend in BACKENDS.items()}

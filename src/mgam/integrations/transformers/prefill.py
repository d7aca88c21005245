"""Prompts of `generate`: their schedules, and long ones read in calls that never cut a query block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgam.errors import SettingError, UnsupportedModelError
from mgam.integrations.transformers.cache import PyramidCache
from mgam.integrations.transformers.call_size import call_size
from mgam.integrations.transformers.calls import lengths_of
from mgam.integrations.transformers.rows_layer import RowsLayer
from mgam.schedule import Schedule
from mgam.settings import Settings

if TYPE_CHECKING:
    from mgam.integrations.transformers.apply import Applied

LONG_PROMPT = 4096
"""Prompts longer than this are read in calls (`call_size`), so that a layer's activations stay small."""
ROOM = 256
"""Generated tokens that there is room for from the start; more takes copying."""


def prepare(model: Any, applied: Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` with a cache that mgam made, unless the caller gave one or wants none.

    Raises:
        UnsupportedModelError: for a kind of cache that cannot hold pyramids, and for masks with holes or on the right.
    """
    kind = _option(model, kwargs, "cache_implementation")
    if kind not in (None, "dynamic", "hybrid"):
        raise UnsupportedModelError(
            f"cache_implementation={kind!r} cannot hold pyramids; leave it out, mgam brings its own cache"
        )
    ids = args[0] if args else kwargs.get("inputs")
    if ids is None:
        ids = kwargs.get("input_ids")
    cached = _option(model, kwargs, "use_cache")
    if kwargs.get("past_key_values") is not None or cached is False or not isinstance(ids, Tensor):
        return kwargs
    kwargs = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = _inferred(model, kwargs, ids)
        if mask is not None:
            kwargs["attention_mask"] = mask
    rows, columns = ids.shape
    lengths = [columns] * rows if mask is None else lengths_of(mask, rows, columns)
    schedules = [of_prompt(applied.settings, length) for length in lengths]
    cache = PyramidCache(model, schedules, reserve=columns + ROOM)
    kwargs["past_key_values"] = cache
    size = _option(model, kwargs, "prefill_chunk_size")
    if not size and columns > LONG_PROMPT:
        size = call_size(model, rows)
    kwargs.pop("prefill_chunk_size", None)
    if _option(model, kwargs, "prefill_chunk_size") is not None:
        kwargs["prefill_chunk_size"] = None  # said in a configuration: it is seen to here
    if size is not None and not (applied.stretched and not applied.ranked):
        repeats = max(_option(model, kwargs, "num_beams") or 1, _option(model, kwargs, "num_return_sequences") or 1)
        documents = [max(0, length - min(applied.settings.question_block, length)) for length in lengths]
        with torch.no_grad():
            read(model, cache, ids, lengths, documents, _call_size(size, applied.settings.block), repeats)
    return kwargs


def of_prompt(settings: Settings, length: int) -> Schedule:
    """The schedule of a prompt of unknown make-up: its last tokens are taken for the question."""
    question = min(settings.question_block, length)
    return Schedule.reading(
        length - question,
        question,
        block=settings.block,
        question_block=settings.question_block,
        lookahead=settings.lookahead,
    )


def read(
    model: Any,
    cache: PyramidCache,
    ids: Tensor,
    lengths: Sequence[int],
    documents: Sequence[int],
    size: int,
    repeats: int = 1,
) -> None:
    """Reads what can be read of the prompts (B, T) in whole calls of `size` tokens, and leaves the rest to `generate`.

    Each row's calls are counted from its own first token: none cuts a query block, whatever the padding. A row that is
    through waits while longer ones are read. The tokens that remain, as many as the row with the most of them has, are
    the columns of the last call; rows that were read beyond that are ahead of it.
    """
    rows, columns = ids.shape
    whole = [document // size for document in documents]
    if not any(whole):
        return
    device = ids.device
    offset = columns - torch.tensor(list(lengths), device=device)
    decoder = model.get_decoder()
    for number in range(max(whole)):
        place = number * size + torch.arange(size, device=device)
        live = torch.tensor([number < count for count in whole], device=device)
        taken = ids.gather(1, (offset[:, None] + place).clamp_max(columns - 1))
        mask = None
        if not bool(live.all()):
            held = torch.tensor([min(number, count) * size for count in whole], device=device)
            past = torch.arange(number * size, device=device) >= number * size - held[:, None]
            mask = torch.cat((past, live[:, None].expand(rows, size)), 1)
        decoder(
            input_ids=taken,
            attention_mask=mask,
            position_ids=place.expand(rows, -1),
            past_key_values=cache,
            use_cache=True,
        )
    left = max(length - count * size for length, count in zip(lengths, whole, strict=True))
    ahead = [count * size - max(0, length - left) for length, count in zip(lengths, whole, strict=True)]
    for layer in cache.layers:
        if isinstance(layer, RowsLayer):
            layer.columns = columns - left
            layer.ahead = list(ahead)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)


def _call_size(size: int, block: int) -> int:
    """Tokens of a call: whole query blocks."""
    if not isinstance(size, int) or size < 1:
        raise SettingError(f"prefill_chunk_size={size!r} must be a whole number of tokens, 1 or more")
    return max(block, size // block * block)


def _option(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """An option of `generate` by its rank: argument, given configuration, the model's configuration."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _inferred(model: Any, kwargs: dict[str, Any], ids: Tensor) -> Tensor | None:
    """The mask that transformers infers from padding tokens when none is given, or None."""
    pad = _option(model, kwargs, "pad_token_id")
    if pad is None or not bool((ids == pad).any()):
        return None
    ends = _option(model, kwargs, "eos_token_id")
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return None if pad in ends else (ids != pad).long()

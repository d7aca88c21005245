"""The first question of a process loads kernels and libraries, which takes longer than answering: it is rehearsed.

A text of zeros is asked while the files of a digest are read. It is as long as the text but for whole chunks, so that
the same kernels are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mgam.documents.store.manifest import Manifest
from mgam.documents.store.segment import Numbers
from mgam.documents.taking_up import prepare, set_recent
from mgam.documents.tokens import Frame
from mgam.engine import Record
from mgam.schedule import Schedule, Span

PAGES = 4096
"""Slots of the pool that is rehearsed with, beside those of what is asked."""
_rehearsed: set[tuple[Any, ...]] = set()


@contextmanager
def rehearsing(model: Any, tokenizer: Any, manifest: Manifest) -> Iterator[None]:
    """Rehearses beside what is done in this context, once a process; other devices than CUDA's need no rehearsal.

    It takes some memory of its own. The model must not be called meanwhile. What fails here fails when a question is
    asked, and is told then.
    """
    what = (model.device, model.dtype, type(model), manifest.shape, manifest.settings)
    if model.device.type != "cuda" or what in _rehearsed:
        yield
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(rehearse, model, tokenizer, manifest)
        yield
    _rehearsed.add(what)


def rehearse(model: Any, tokenizer: Any, manifest: Manifest) -> list[int]:
    """Asks a text of zeros a question, and returns the two tokens of its answer."""
    shape, settings, device = manifest.shape, manifest.settings, model.device
    chunk, step = shape.levels.chunk, shape.levels.sizes[-1]
    beyond = max(0, manifest.tokens - manifest.dense_until - 2 * step)
    count = manifest.tokens - beyond // step * step
    asked = Frame.of(tokenizer).question(tokenizer, "What is said about the person who is named first?")
    slots = PAGES + shape.layers * shape.heads * (len(asked) // chunk + 4)
    pool, cache = prepare(model, shape, count + len(asked) + chunk, slots)
    pool.fetch = _zeros
    border = count + len(asked)
    spans = (Span(count, settings.block, settings.lookahead), Span(border, settings.question_block, settings.lookahead))
    for layer in cache.pyramids.values():
        pyramid = layer.pyramid
        assert pyramid.search is not None
        for states in (*pyramid.keys, *pyramid.values, pyramid.search):
            states.zero_()
        rest = pool.keys.new_zeros(1, shape.heads, count % chunk, shape.dim)
        pyramid.put(slice(None), count - count % chunk, rest, rest)
        pyramid.lengths, layer.columns = [count], count
        layer.schedules = [Schedule((*spans, Span(None, 1)))]
        if shape.recent:
            set_recent(layer, pool.keys.new_zeros(1, shape.query_heads, shape.recent, shape.dim))
    cache.watch(Record(evidence_from=count))
    ids = torch.cat((torch.zeros(count, dtype=torch.int64), torch.tensor(asked)))[None].to(device)
    produced = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2, min_new_tokens=2,
        do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=0,
    )  # fmt: skip
    new: list[int] = produced[0, border:].tolist()
    return new


def _zeros(layer: int, heads: Numbers, chunks: Numbers, pages: Tensor) -> None:
    pages.zero_()

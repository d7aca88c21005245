"""InfiniRetri: a text is read part by part, and what the question attends to is carried on (arXiv 2502.12962).

Only the rows of attention that the question needs are computed, in the last layer; sentences are known by their tokens
and never looked for again in a string.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mgam.errors import DocumentError, SettingError

NAME = "mgam-question-rows"
SENTENCE = re.compile(r".+?(?:[.!?。！？]+(?=\s|$)|\n\s*\n|$)\s*", re.DOTALL)


@dataclass(frozen=True)
class Retrieval:
    """The dials of the loop."""

    window: int = 1024
    """Tokens of new text per part."""
    topk: int = 300
    """Tokens of the context that are picked per part; their sentences are carried on."""
    phrase: int = 8
    """Tokens over which attention is summed: about as many as the answer has."""
    cap: int = 2048
    """Tokens carried on at most; the sentences with the lowest scores go first."""

    def __post_init__(self) -> None:
        for name in ("window", "topk", "phrase", "cap"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be 1 or more tokens")


@dataclass(frozen=True)
class Sentence:
    """A sentence by its tokens, and where it stands in the text."""

    ids: tuple[int, ...]
    start: int
    end: int


def sentences(text: str, tokenizer: Any, most: int) -> list[Sentence]:
    """All of a text, in order, none longer than `most` tokens (a longer one is cut, nothing is left out)."""
    found = []
    for match in SENTENCE.finditer(text):
        ids = tokenizer(match.group(), add_special_tokens=False)["input_ids"]
        for first in range(0, len(ids), most):
            found.append(Sentence(tuple(ids[first : first + most]), match.start(), match.end()))
    return found


def parts(items: Sequence[Sentence], window: int) -> list[list[Sentence]]:
    """Whole sentences packed into parts of at most `window` tokens."""
    packed: list[list[Sentence]] = []
    room = 0
    for item in items:
        if not packed or room < len(item.ids):
            packed.append([])
            room = window
        packed[-1].append(item)
        room -= len(item.ids)
    return packed


@torch.no_grad()
def retrieve(
    model: Any, tokenizer: Any, text: str, question: str, retrieval: Retrieval | None = None
) -> list[Sentence]:
    """The sentences that are left when the whole text was read, in the order of the text.

    Every call of the model is at most `window + cap` tokens and the question long.

    Raises:
        DocumentError: for an empty text or question.
    """
    dials = retrieval or Retrieval()
    if not text.strip() or not question.strip():
        raise DocumentError("infini-retri needs a text and a question; one of them is empty")
    asked = tokenizer("\n\n" + question, add_special_tokens=False)["input_ids"]
    lead = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    carried: list[Sentence] = []
    weight: Tensor | None = None
    with _rows(model) as attend:
        for part in parts(sentences(text, tokenizer, dials.window), dials.window):
            context = [*carried, *part]
            ids = [*lead, *(one for item in context for one in item.ids), *asked]
            rows = attend(ids, len(asked))
            if weight is None:
                weight = rows[:, -len(asked) :].sum(1) ** 2
            score = scores(rows[:, len(lead) : len(ids) - len(asked)], weight, dials.phrase)
            carried = keep(context, score, dials)
    return carried


def scores(rows: Tensor, weight: Tensor, phrase: int) -> Tensor:
    """Score (n,) of each token: attention (Q, n) summed over a phrase around it, by the rows' weights (Q,)."""
    kernel = rows.new_ones(1, 1, phrase)
    left = (phrase - 1) // 2
    padded = torch.nn.functional.pad(rows[:, None], (left, phrase - 1 - left))
    return (weight[:, None] * torch.nn.functional.conv1d(padded, kernel)[:, 0]).sum(0)


def keep(context: Sequence[Sentence], score: Tensor, dials: Retrieval) -> list[Sentence]:
    """The sentences that hold one of the best tokens, at most `cap` tokens of them, in order."""
    owner = torch.repeat_interleave(torch.arange(len(context)), torch.tensor([len(item.ids) for item in context]))
    best = score.cpu().topk(min(dials.topk, len(score)))
    peak: dict[int, float] = {}
    for place, value in zip(owner[best.indices].tolist(), best.values.tolist(), strict=True):
        peak.setdefault(place, value)
    chosen, room = [], dials.cap
    for place in sorted(peak, key=lambda one: -peak[one]):
        if len(context[place].ids) <= room:
            chosen.append(place)
            room -= len(context[place].ids)
    return [context[place] for place in sorted(chosen)]


@contextmanager
def _rows(model: Any) -> Iterator[Any]:
    """While it lasts, gives a function (ids, last) -> attention (last, n) of the last tokens, summed over heads."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    decoder = model.get_decoder()
    module = decoder.layers[-1].self_attn
    model.set_attn_implementation(NAME)
    module._mgam_rows = {"last": 0, "rows": None}

    def attend(ids: Sequence[int], last: int) -> Tensor:
        module._mgam_rows["last"] = last
        decoder(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
        return module._mgam_rows["rows"]

    try:
        yield attend
    finally:
        del module._mgam_rows
        model.set_attn_implementation(before)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    wanted = getattr(module, "_mgam_rows", None)
    if wanted is not None:
        last, tokens = wanted["last"], key.shape[2]
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        asking = query[0, :, -last:].float().unflatten(0, (key.shape[1], -1))
        logits = scale * asking @ key[0, :, None].float().transpose(-1, -2)
        own = torch.arange(tokens - last, tokens, device=key.device)[:, None]
        logits = logits.masked_fill(torch.arange(tokens, device=key.device) > own, -torch.inf)
        wanted["rows"] = torch.softmax(logits, -1).sum((0, 1))
    return sdpa_attention_forward(module, query, key, value, mask, **options)

"""How well a text supports an answer: by the words that the model would not have said without it.

A word of an answer says something about the text only as far as the model would not have said it anyway. So the log
probabilities of an answer's tokens, given text and question, are averaged with weights: how unlikely each token is
given the question alone. `experiments/not_found` measures what that tells; docs/how-to/ask.md has the figures.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mgam.documents.prompt import bare

FOUND = 0.45
"""Answers with less confidence are marked as not found in the text."""
FOUND_AGAIN = 0.8
"""The same after a second look: a short text of like passages lends confidence to wrong answers too."""


class Watch(LogitsProcessor):
    """Notes the log probability of each token that is chosen greedily; changes nothing."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes the scores (B, V) of the next token."""
        self.seen.append(torch.log_softmax(scores[:1].float(), -1).amax())
        return scores

    def as_list(self) -> LogitsProcessorList:
        """In the form that `generate` takes."""
        return LogitsProcessorList([self])


@torch.no_grad()
def confidence(model: Any, tokenizer: Any, question: str, answer: Tensor, watch: Watch) -> float | None:
    """Confidence in an answer (tokens, (n,)), from 0 to 1: the weighted geometric mean of its tokens' probabilities.

    One further call of the model on question and answer, without the text. None when nothing was watched.
    """
    if not len(answer) or len(watch.seen) != len(answer):
        return None
    given = torch.stack(watch.seen).cpu()
    asked = torch.tensor(bare(tokenizer, question), device=answer.device)
    logits = model(input_ids=torch.cat((asked, answer))[None], use_cache=False).logits[0, len(asked) - 1 : -1]
    alone = torch.log_softmax(logits.float(), -1).gather(1, answer[:, None])[:, 0].cpu()
    weight = (-alone).clamp_min(1e-6)
    return round(math.exp(float((weight * given).sum() / weight.sum())), 4)


def threshold(again: bool) -> float:
    """Confidence from which on an answer counts as found, at first sight or after a second look."""
    return FOUND_AGAIN if again else FOUND


def is_found(sure: float | None, again: bool = False) -> bool | None:
    """Whether an answer seems to stand in the text; None when that is not known."""
    return None if sure is None else sure >= threshold(again)

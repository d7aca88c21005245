"""Pass key in repeated filler.

The form of Mohtashami and Jaggi 2023, "Landmark Attention" (arXiv 2305.16300): one number in text that says nothing.
"""

from __future__ import annotations

from itertools import repeat

from mgam.evaluation.haystack import Needle, build_haystack
from mgam.evaluation.metrics import Score, any_found
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample

FILLER = " The mill turns by the river. The road goes over the hill. A bell rings, and the day begins again."
QUESTION = "What is the pass key that is hidden in the text? Answer with the number only."
NEW_TOKENS = 16


def build(request: Request) -> Draft:
    """One five-digit number at the request's depth."""
    key = str(request.rng().randrange(10_000, 100_000))
    needle = Needle(f" Keep this in mind: the pass key is {key}. Once more, {key} is the pass key.", request.depth())
    room = request.room(QUESTION, NEW_TOKENS)
    stack = build_haystack(repeat(FILLER), [needle], room, request.counter, keep_out=request.keep_out)
    return Draft(stack.text, QUESTION, (key,), stack.spans)


def score(sample: Sample, reply: str) -> Score:
    """1 if the number stands in the reply."""
    return Score(any_found(reply, sample.answers))


register(
    Task(
        name="passkey",
        summary="one number hidden in repeated filler",
        paper="arXiv 2305.16300",
        groups=("synthetic", "quick"),
        max_new_tokens=NEW_TOKENS,
        build=build,
        score=score,
        hits=True,
    )
)

"""Key-value retrieval: one value out of a JSON object of random UUIDs.

Liu et al. 2023, "Lost in the Middle" (arXiv 2307.03172): no words to hold on to, every record looks like the one asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mgam.evaluation.haystack import Needle, build_haystack
from mgam.evaluation.metrics import Score, any_found
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample
from mgam.evaluation.tasks.needles import random_uuid

NEW_TOKENS = 48


def record(key: str, value: str) -> str:
    """One line of the JSON object."""
    return f'\n "{key}": "{value}"'


def random_records(rng: random.Random) -> Iterator[str]:
    """Records that nobody asks for; 122 random bits make a collision unthinkable."""
    while True:
        yield record(random_uuid(rng), random_uuid(rng))


def build(request: Request) -> Draft:
    """One record among as many as fit."""
    rng = request.rng()
    key, value = random_uuid(rng), random_uuid(rng)
    question = (
        f'The JSON object above maps keys to values. What is the value of the key "{key}"? Answer with the value only.'
    )
    stack = build_haystack(
        random_records(rng),
        [Needle(record(key, value), request.depth())],
        request.room(question, NEW_TOKENS),
        request.counter,
        joiner=",",
        head="{",
        tail="\n}",
        keep_out=request.keep_out,
    )
    return Draft(stack.text, question, (value,), stack.spans)


def score(sample: Sample, reply: str) -> Score:
    """1 if the value stands in the reply."""
    return Score(any_found(reply, sample.answers))


register(
    Task(
        name="key_value",
        summary="the value of one key in a JSON object of random UUIDs",
        paper="arXiv 2307.03172",
        groups=("synthetic", "quick"),
        max_new_tokens=NEW_TOKENS,
        build=build,
        score=score,
        hits=True,
    )
)

"""Variable tracking: which names hold one value, followed through assignments.

RULER's VT (arXiv 2404.06654): one chain of four hops, statements in order at random places in noise. Names of one
document are all different (RULER only tops up duplicates, so that a chain there can be malformed).
"""

from __future__ import annotations

import random
import string
from itertools import pairwise, repeat

from mgam.evaluation.haystack import Needle, build_haystack
from mgam.evaluation.metrics import Score, words_scores
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample
from mgam.evaluation.tasks.needles import NOISE

HOPS, NAME_LETTERS, NEW_TOKENS = 4, 5, 30


def fresh_names(rng: random.Random, count: int, letters: int) -> list[str]:
    """Different names of capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(found)


def build(request: Request) -> Draft:
    """One chain: the first variable gets a number, each later one the value of the one before."""
    rng = request.rng()
    names = fresh_names(rng, HOPS + 1, NAME_LETTERS)
    value = str(rng.randrange(10_000, 100_000))
    statements = [f" VAR {names[0]} = {value}."]
    statements += [f" VAR {new} = VAR {old}." for old, new in pairwise(names)]
    depths = sorted([request.depth(), *(rng.random() for _ in names[1:])])
    question = (
        f"Which variables hold the value {value}, directly or by way of other variables? There are {len(names)} of "
        "them. Answer with their names only."
    )
    needles = [Needle(text, depth) for text, depth in zip(statements, depths, strict=True)]
    room = request.room(question, NEW_TOKENS)
    stack = build_haystack(repeat(NOISE), needles, room, request.counter, keep_out=request.keep_out)
    return Draft(stack.text, question, tuple(names), stack.spans, hops=HOPS, details={"ruler": "vt"})


def score(sample: Sample, reply: str) -> Score:
    """RULER's share of names found; beside it IoU over the names in the reply."""
    found = words_scores(reply, sample.answers)
    said = {word for word in reply.replace(",", " ").replace(".", " ").split() if word.isupper() and len(word) == 5}
    union = len(said | set(sample.answers))
    return Score(found["recall"], {"iou": len(said & set(sample.answers)) / union})


register(
    Task(
        name="variables",
        summary="the five names that hold one value, over a chain of four assignments (RULER vt)",
        paper="arXiv 2404.06654",
        groups=("synthetic", "ruler", "quick"),
        max_new_tokens=NEW_TOKENS,
        build=build,
        score=score,
    )
)

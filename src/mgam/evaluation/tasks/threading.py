"""Needle threading: values that are keys again, followed through a JSON object of UUIDs.

Roberts et al. 2024, "Needle Threading: Can LLMs Follow Threads through Near-Million-Scale Haystacks?" (arXiv
2411.05000); the generator was not published, this one is ours. Lengths here are tokens of the model at hand, where the
paper counts characters because tokenizers differ on UUIDs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from mgam.evaluation.haystack import Needle, build_haystack
from mgam.evaluation.metrics import Score, list_items, set_scores, share_found
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample
from mgam.evaluation.tasks.key_value import record
from mgam.evaluation.tasks.needles import random_uuid

NEEDLES, THREAD_HOPS, THREADS, MARK = 4, 4, 3, "*"
ONE_TOKENS, MANY_TOKENS = 48, 160
Direction = Literal["forward", "backward", "random"]
INTRODUCTION = "The JSON object above maps keys to values."


def _pairs(rng: random.Random) -> Iterator[str]:
    """Filler records. 122 random bits keep an accidental link between records out of reach."""
    while True:
        yield record(random_uuid(rng), random_uuid(rng))


def _draft(
    request: Request, rng: random.Random, needles: list[Needle], asked: str, golds: list[str], hops: int = 1
) -> Draft:
    tokens = ONE_TOKENS if len(golds) == 1 else MANY_TOKENS
    question = f"{INTRODUCTION} {asked}"
    room = request.room(question, tokens)
    stack = build_haystack(
        _pairs(rng), needles, room, request.counter, joiner=",", head="{", tail="\n}", keep_out=request.keep_out
    )
    return Draft(stack.text, question, tuple(golds), stack.spans, hops=hops)


def _needles(request: Request, rng: random.Random, pairs: list[tuple[str, str]]) -> list[Needle]:
    depths = [request.depth(), *(rng.random() for _ in pairs[1:])]
    return [Needle(record(*pair), depth) for pair, depth in zip(pairs, depths, strict=True)]


def build_single(request: Request) -> Draft:
    """The value of one key."""
    rng = request.rng()
    pair = (random_uuid(rng), random_uuid(rng))
    asked = f'What is the value of "{pair[0]}"? Answer with the value only.'
    return _draft(request, rng, _needles(request, rng, [pair]), asked, [pair[1]])


def build_multiple(request: Request) -> Draft:
    """The values of several keys, in the order asked."""
    rng = request.rng()
    pairs = [(random_uuid(rng), random_uuid(rng)) for _ in range(NEEDLES)]
    listed = ", ".join(f'"{key}"' for key, _ in pairs)
    asked = f"What are the values of {listed}? Answer with a JSON list of the values in this order only."
    return _draft(request, rng, _needles(request, rng, pairs), asked, [value for _, value in pairs])


def build_conditional(request: Request) -> Draft:
    """The values of all keys that hold a certain character, wherever they are."""
    rng = request.rng()
    pairs = []
    for _ in range(NEEDLES):
        key, place = random_uuid(rng), rng.choice([n for n in range(36) if n not in (8, 13, 18, 23)])
        pairs.append((key[:place] + MARK + key[place + 1 :], random_uuid(rng)))
    asked = (
        f'Some keys hold the character "{MARK}". What are the values of all of these keys? Answer with a JSON list of '
        "the values only."
    )
    return _draft(request, rng, _needles(request, rng, pairs), asked, [value for _, value in pairs])


def _thread(
    rng: random.Random, direction: Direction, first_depth: float | None
) -> tuple[list[tuple[str, str]], list[float]]:
    """Records of one thread in the order in which it is followed, and where they stand."""
    names = [random_uuid(rng) for _ in range(THREAD_HOPS + 1)]
    depths = [rng.random() if first_depth is None else first_depth, *(rng.random() for _ in range(THREAD_HOPS - 1))]
    if direction != "random":
        depths.sort(reverse=direction == "backward")
    return list(itertools.pairwise(names)), depths


def build_thread(direction: Direction, threads: int, request: Request) -> Draft:
    """Follows `threads` threads of THREAD_HOPS records each from their first keys to their last values."""
    rng = request.rng()
    found = [_thread(rng, direction, request.depth() if number == 0 else None) for number in range(threads)]
    needles = [
        Needle(record(*pair), depth) for pairs, depths in found for pair, depth in zip(pairs, depths, strict=True)
    ]
    starts = [pairs[0][0] for pairs, _ in found]
    golds = [pairs[-1][1] for pairs, _ in found]
    follow = "Take its value; if that is a key too, take the value of that key, and so on"
    if threads == 1:
        asked = f'Start with the key "{starts[0]}". {follow}. What is the final value? Answer with the value only.'
    else:
        listed = ", ".join(f'"{start}"' for start in starts)
        asked = (
            f"For each of the keys {listed}: {follow}. What are the final values? Answer with a JSON list "
            "of the values in this order only."
        )
    return _draft(request, rng, needles, asked, golds, hops=THREAD_HOPS)


def score(sample: Sample, reply: str) -> Score:
    """Share of gold values in the reply; beside it IoU and the share of list places that are right."""
    items = [item.strip("\"'") for item in list_items(reply)]
    right = sum(said == gold for said, gold in zip(items, sample.answers, strict=False))
    parts = {"iou": set_scores(items, sample.answers)["iou"], "in_place": right / len(sample.answers)}
    return Score(share_found(reply, sample.answers), parts)


_KINDS: dict[str, tuple[str, Callable[[Request], Draft], int]] = {
    "threading_single": ("the value of one key", build_single, ONE_TOKENS),
    "threading_multiple": ("the values of four keys", build_multiple, MANY_TOKENS),
    "threading_conditional": ("the values of all keys that hold a character", build_conditional, MANY_TOKENS),
    "threading_forward": ("a thread that runs on in the text", partial(build_thread, "forward", 1), ONE_TOKENS),
    "threading_backward": ("a thread that runs back in the text", partial(build_thread, "backward", 1), ONE_TOKENS),
    "threading_random": ("a thread that jumps about", partial(build_thread, "random", 1), ONE_TOKENS),
    "threading_many": ("three threads at once", partial(build_thread, "random", THREADS), MANY_TOKENS),
}

for _name, (_summary, _build, _tokens) in _KINDS.items():
    register(
        Task(
            name=_name,
            summary=f"{_summary}, in a JSON object of UUIDs",
            paper="arXiv 2411.05000",
            groups=("synthetic", "threading"),
            max_new_tokens=_tokens,
            build=_build,
            score=score,
            hits=_tokens == ONE_TOKENS,
        )
    )

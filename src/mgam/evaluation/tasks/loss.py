"""Next-token loss on real text, by position: does what lies far back still help?

Mean negative log-likelihood in nats over all tokens but the first, and over each doubling of the position, so that a
curve over position can be drawn; lower is better. TEST documents alone; the shipped excerpt is TUNE text, for trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from mgam.errors import SettingError
from mgam.evaluation.metrics import Score
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample

FIRST_EDGE = 1024  # tokens: the first bin is 0 to 1k, then 1k to 2k, 2k to 4k, ...


def build(source: str, request: Request) -> Draft:
    """A stretch of one document, from a place drawn by the seed, as long as asked."""
    rng = request.rng()
    characters = request.length * 5
    texts = [text for text in request.texts.for_tasks(source) if len(text.text) > 5 * request.length]
    if not texts:
        raise SettingError(f"no TEST document of {source} has {request.length} tokens; give shorter --lengths")
    text = rng.choice(texts)
    start = rng.randrange(max(1, len(text.text) - 5 * request.length))
    start = max(0, text.text.find("\n\n", start) + 2) if text.text.find("\n\n", start) >= 0 else start
    piece = text.text[start : start + characters]
    counted = request.counter.count(piece)
    if counted < request.length:
        piece = text.text[start : start + 2 * characters] if start + 2 * characters <= len(text.text) else text.text
        counted = request.counter.count(piece)
    if counted > request.length:
        piece = request.counter.cut(piece, request.length - 2)
    return Draft(piece, "", (), (), details={"document": text.name})


def bins(length: int) -> list[tuple[int, int]]:
    """Stretches of position, each twice as far as the one before."""
    found, start, end = [], 0, FIRST_EDGE
    while start < length:
        found.append((start, min(end, length)))
        start, end = end, 2 * end
    return found


def score_losses(sample: Sample, losses: Sequence[float]) -> Score:
    """The mean, and the mean of each bin; raises ValueError when a reader gave no losses."""
    if not losses:
        raise ValueError("the reader gave no losses")
    parts = {}
    for start, end in bins(len(losses) + 1):
        inside = losses[max(0, start - 1) : end - 1]
        if inside:
            parts[f"{start // 1024}k-{-(-end // 1024)}k"] = fmean(inside)
    return Score(fmean(losses), parts)


def score(sample: Sample, reply: str) -> Score:
    """There is no question, so a reply is worth nothing."""
    return Score(0.0)


for _source, _what in (("shipped", "a novel's first chapters"), ("novels", "novels"), ("speeches", "speeches")):
    register(
        Task(
            name=f"loss_{_source}",
            summary=f"next-token loss on {_what}, by position",
            paper="",
            groups=("loss",) if _source == "shipped" else ("loss", "real"),
            max_new_tokens=0,
            build=partial(build, _source),
            score=score,
            needs="" if _source == "shipped" else _source,
            unit="nats",
            score_losses=score_losses,
        )
    )

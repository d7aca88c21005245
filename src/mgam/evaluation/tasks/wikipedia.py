"""Summarise an article from its body; its own lead section is the reference.

The article's title, `==` headings and infobox are gone; articles shorter than the length asked for are followed by
others, of which nothing is asked, and longer ones keep first and last halves (LongBench's rule, arXiv 2308.14508).
"""

from __future__ import annotations

import json
import random

from mgam.evaluation.metrics import Score
from mgam.evaluation.registry import Task, register
from mgam.evaluation.rouge import rouge_l, rouge_lsum, rouge_n
from mgam.evaluation.sample import Draft, Request, Sample
from mgam.evaluation.texts import split_sentences

SOURCE, NEW_TOKENS = "wikipedia", 192
SHORTEST_LEAD, SHORTEST_BODY = 400, 4000  # characters


def build(request: Request) -> Draft:
    """One article among as many as fit, the gold one at the request's depth."""
    rng = request.rng()
    articles = [json.loads(text.text) for text in request.texts.texts(SOURCE, "test")]
    articles = [one for one in articles if len(one["lead"]) >= SHORTEST_LEAD and len(one["body"]) >= SHORTEST_BODY]
    random.Random(f"wiki_lead/{request.seed}").shuffle(articles)
    article = articles[request.index % len(articles)]  # no article twice before all were asked for
    question = f'Write a summary of the article "{article["title"]}" above: the first paragraph of its entry.'
    room = request.room(question, NEW_TOKENS)
    parts, gold = _parts(request, rng, articles, article, room)
    document = "\n\n".join(parts)
    start = sum(len(part) + 2 for part in parts[:gold])
    spans = ((start, start + len(parts[gold])),)
    return Draft(document, question, (article["lead"],), spans, details={"title": article["title"]})


def _parts(
    request: Request, rng: random.Random, articles: list[dict[str, str]], article: dict[str, str], room: int
) -> tuple[list[str], int]:
    """Whole articles, the last of them cut, around the gold one; and the gold one's number."""
    counter = request.counter
    text = _titled(article)
    tokens = counter.count(text)
    if tokens > room:
        return [_middle_out(request, text, tokens, room)], 0
    others = [one for one in articles if one is not article]
    rng.shuffle(others)
    left, chosen = room - tokens - 4, []
    for other in others:
        body = _titled(other)
        size = counter.count(body) + 4
        if size > left:
            body = _beginning(request, body, left - 8)
            size = left
        if len(body) > 200:
            chosen.append(body)
        left -= size
        if left < 64:
            break
    gold = int(request.depth() * (len(chosen) + 1))
    return [*chosen[:gold], text, *chosen[gold:]], gold


def _titled(article: dict[str, str]) -> str:
    return f"# {article['title']}\n\n{article['body']}"


def _beginning(request: Request, text: str, room: int) -> str:
    """Whole sentences from the start, at most `room` tokens of them."""
    pieces = list(split_sentences(text))
    kept, used = [], 0
    for piece, tokens in zip(pieces, request.counter.counts(pieces), strict=True):
        used += tokens
        if used > room:
            break
        kept.append(piece)
    return "".join(kept).strip()


def _middle_out(request: Request, text: str, tokens: int, room: int) -> str:
    """First and last halves of what fits, cut at sentences."""
    pieces = list(split_sentences(text))
    sizes = request.counter.counts(pieces)
    half = room * 0.98 / 2
    first, used = 0, 0
    while first < len(pieces) and used + sizes[first] <= half:
        used += sizes[first]
        first += 1
    last, used = len(pieces), 0
    while last > first and used + sizes[last - 1] <= half:
        last -= 1
        used += sizes[last]
    return "".join([*pieces[:first], *pieces[last:]]).strip()


def score(sample: Sample, reply: str) -> Score:
    """ROUGE-L F; ROUGE-1, -2 and the summary-level form (stemmed, as papers give them) beside it."""
    gold = sample.answers[0]
    lines = (
        "\n".join(split_sentences(reply)).replace("\n\n", "\n"),
        "\n".join(split_sentences(gold)).replace("\n\n", "\n"),
    )
    parts = {
        "rouge1": rouge_n(reply, gold, 1, stem=True).f1,
        "rouge2": rouge_n(reply, gold, 2, stem=True).f1,
        "rougeLsum": rouge_lsum(*lines, stem=True).f1,
    }
    return Score(rouge_l(reply, gold).f1, parts)


register(
    Task(
        name="wiki_lead",
        summary="summarise a Wikipedia article from its body; its own lead is the reference (ROUGE-L)",
        paper="arXiv 2308.14508",
        groups=("real", "summaries"),
        max_new_tokens=NEW_TOKENS,
        build=build,
        score=score,
        needs=SOURCE,
    )
)

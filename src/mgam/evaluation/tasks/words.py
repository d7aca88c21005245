"""Common words and frequent words: aggregation over the whole text.

RULER's CWE and FWE (arXiv 2404.06654). Common words: a numbered list in which ten words occur 30 times and all others
three times (6 and once below 4k tokens). Frequent words: coded words whose frequency falls with the square of their
rank; rank 1 is a row of dots, ranks 2 to 4 are asked for.
"""

from __future__ import annotations

import random
import re
import string

from mgam.errors import SettingError
from mgam.evaluation.metrics import Score, words_scores
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample
from mgam.evaluation.texts import words

COMMON, COMMON_TOKENS = 10, 120
SHORT = 4096  # below this, RULER's smaller counts
FREQUENT, FREQUENT_TOKENS, CODE_LETTERS, ALPHA = 3, 50, 6, 2.0
DOTS = "..."
ZETA_2 = 1.6449340668482264
FILL = 0.985


def build_common(request: Request) -> Draft:
    """A shuffled, numbered list of words."""
    rng = request.rng()
    often, rarely = (6, 1) if request.length < SHORT else (30, 3)
    question = (
        f"What are the {COMMON} most common words in the list above? Answer with the {COMMON} words only, separated "
        "by commas."
    )
    room = request.room(question, COMMON_TOKENS)
    pool = rng.sample(words(), len(words()))
    common, others = pool[:COMMON], pool[COMMON:]
    rare = max(0, int((room / 5 - COMMON * often) / rarely))
    for _ in range(4):
        document = _numbered(rng, common, often, others, rare, rarely)
        exact = request.counter.count(document)
        if FILL * room <= exact <= room:
            break
        # entries that must go or come; the few steps above room are paid for with one percent
        rare = max(0, rare - round((exact - room * 0.993) / (exact / (COMMON * often + rare * rarely)) / rarely))
    if exact > room or rare < COMMON:
        raise SettingError(
            f"common_words needs a list longer than {request.length} tokens allow; give --lengths of at least 2k"
        )
    details = {"ruler": "cwe", "counts": {"common": often, "others": rarely, "different": COMMON + rare}}
    return Draft(document, question, tuple(common), ((0, len(document)),), details=details)


def _numbered(rng: random.Random, common: list[str], often: int, others: list[str], rare: int, rarely: int) -> str:
    """Beyond the stock of different words, the last ones get a number; each occurs `rarely` times."""
    chosen = [others[n] if n < len(others) else f"{others[n % len(others)]}{n // len(others)}" for n in range(rare)]
    entries = common * often + chosen * rarely
    random.Random(rng.random()).shuffle(entries)
    return "\n".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))


def build_frequent(request: Request) -> Draft:
    """Coded words, shuffled; the word of rank k occurs n / (k^2 zeta(2)) times."""
    rng = request.rng()
    question = (
        f"The text above is made of coded words; ignore the dots. Which are the {FREQUENT} most frequent coded words? "
        "Answer with the three words only."
    )
    room = request.room(question, FREQUENT_TOKENS)
    codes = _codes(rng, max(room // 50, FREQUENT + 2))
    entries, limit = room // 3, room // 3
    for _ in range(6):
        counts = _zipf(entries, len(codes))
        document = _shuffled(rng, codes, counts)
        exact = request.counter.count(document)
        if FILL * room <= exact <= room:
            break
        limit = round(entries * room * 0.993 / exact)
        entries = max(64, limit)
    if exact > room:
        raise SettingError(f"frequent_words does not fit into {request.length} tokens; give --lengths of at least 1k")
    details = {"ruler": "fwe", "counts": dict(zip(codes[: FREQUENT + 1], counts[1 : FREQUENT + 2], strict=False))}
    return Draft(document, question, tuple(codes[:FREQUENT]), ((0, len(document)),), details=details)


def _codes(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_lowercase, k=CODE_LETTERS))] = None
    return list(found)


def _zipf(entries: int, codes: int) -> list[int]:
    """How often each rank occurs, dots first; neighbours of ranks asked for always differ."""
    counts = [round(entries / ZETA_2 / rank**ALPHA) for rank in range(1, codes + 2)]
    for rank in range(FREQUENT, 0, -1):
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    return counts


def _shuffled(rng: random.Random, codes: list[str], counts: list[int]) -> str:
    entries = [word for word, count in zip([DOTS, *codes], counts, strict=True) for _ in range(count)]
    random.Random(rng.random()).shuffle(entries)
    return " ".join(entries)


def score_common(sample: Sample, reply: str) -> Score:
    """Share of gold words in the reply, as whole words (RULER's); beside it IoU over all words of the reply."""
    found = words_scores(reply, sample.answers)
    return Score(found["recall"], {"iou": found["iou"]})


def score_frequent(sample: Sample, reply: str) -> Score:
    """Share of gold words among the first three coded words of the reply.

    RULER looks at the whole reply, where copying the start of the text scores nearly all: the frequent words come first
    everywhere. Its score stands beside this one as `anywhere`.
    """
    said = dict.fromkeys(re.findall(rf"\b[a-z]{{{CODE_LETTERS}}}\b", reply.lower()))
    coded = [word for word in said if word in sample.document]
    first = set(coded[:FREQUENT]) & set(sample.answers)
    found = words_scores(reply, sample.answers)
    return Score(len(first) / FREQUENT, {"anywhere": found["recall"], "iou": found["iou"]})


register(
    Task(
        name="common_words",
        summary="the ten words that a long list repeats most (RULER cwe)",
        paper="arXiv 2404.06654",
        groups=("synthetic", "ruler"),
        max_new_tokens=COMMON_TOKENS,
        build=build_common,
        score=score_common,
    )
)
register(
    Task(
        name="frequent_words",
        summary="the three most frequent coded words (RULER fwe)",
        paper="arXiv 2404.06654",
        groups=("synthetic", "ruler", "quick"),
        max_new_tokens=FREQUENT_TOKENS,
        build=build_frequent,
        score=score_frequent,
    )
)

"""HotpotQA, NarrativeQA, CNN/DailyMail and LongBench, with their official scores.

The records come from `mgam data fetch`. HotpotQA's ten paragraphs are padded with those of other questions up to the
length asked for, as RULER does; stories and articles that are too long lose their middle, as in LongBench, and short
ones stay as they are. Questions are worded by us, so figures compare with each other, not with published tables.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mgam.errors import SettingError
from mgam.evaluation.haystack import Needle, build_haystack
from mgam.evaluation.metrics import (
    Score,
    any_found,
    best,
    exact_match,
    hotpot_f1,
    longbench_classification,
    longbench_code,
    longbench_numbers,
    token_f1,
)
from mgam.evaluation.registry import Task, register
from mgam.evaluation.rouge import rouge_l, rouge_lsum, rouge_n
from mgam.evaluation.sample import Draft, Request, Sample
from mgam.evaluation.texts import split_sentences

ANSWER_TOKENS, STORY_TOKENS, SUMMARY_TOKENS = 32, 128, 128


def _records(request: Request, source: str) -> list[dict[str, Any]]:
    """All records in an order drawn by the seed: trials take them one after another."""
    found = list(request.texts.records(source, None).values())
    random.Random(f"{source}/{request.seed}").shuffle(found)
    return found


def _pick(request: Request, records: list[dict[str, Any]]) -> dict[str, Any]:
    return records[request.index % len(records)]


# --- HotpotQA -------------------------------------------------------------------------------------------------------


def _paragraph(title: str, sentences: list[str]) -> str:
    return f"\n\n{title}\n{''.join(sentences).strip()}"


def _other_paragraphs(records: list[dict[str, Any]], chosen: dict[str, Any], rng: random.Random) -> Iterator[str]:
    titles = {title for title, _ in chosen["paragraphs"]}
    for record in rng.sample(records, len(records)):
        for title, sentences in record["paragraphs"]:
            if title not in titles:
                titles.add(title)
                yield _paragraph(title, sentences)


def build_hotpot(request: Request) -> Draft:
    """The question's own paragraphs at random places among those of other questions."""
    rng = request.rng()
    records = _records(request, "hotpotqa")
    record = _pick(request, records)
    question = f"{record['question']} Answer with the answer only."
    room = request.room(question, ANSWER_TOKENS)
    gold = {title for title, _ in record["facts"]}
    paragraphs = sorted(record["paragraphs"], key=lambda one: one[0] not in gold)
    depths = [request.depth(), *(rng.random() for _ in paragraphs[1:])]
    needles = [
        Needle(_paragraph(title, sentences), depth)
        for (title, sentences), depth in zip(paragraphs, depths, strict=True)
    ]
    stack = build_haystack(_other_paragraphs(records, record, rng), needles, room, request.counter)
    spans = stack.spans[: max(1, len(gold))]
    details = {"id": record["id"], "facts": [list(fact) for fact in record["facts"]]}
    return Draft(stack.text, question, (record["answer"],), spans, hops=max(1, len(gold)), details=details)


def score_hotpot(sample: Sample, reply: str) -> Score:
    """HotpotQA's F1, with its rule for yes and no; exact match beside it."""
    gold = sample.answers[0]
    f1, precision, recall = hotpot_f1(reply, gold)
    return Score(f1, {"em": exact_match(reply, gold), "precision": precision, "recall": recall})


# --- NarrativeQA ----------------------------------------------------------------------------------------------------


def build_narrative(request: Request) -> Draft:
    """A question about a whole book or film script."""
    record = _pick(request, _records(request, "narrativeqa"))
    question = f"{record['question']} Answer in a few words."
    document = request.counter.middle_out(record["story"], request.room(question, STORY_TOKENS))
    return Draft(document, question, tuple(record["answers"]), details={"id": record["id"]})


def score_narrative(sample: Sample, reply: str) -> Score:
    """LongBench's F1, the higher of both answers; ROUGE-L (rouge-score) beside it. The authors published no scorer."""
    rouge = best(lambda said, gold: rouge_l(said, gold).f1, reply, sample.answers)
    em = best(exact_match, reply, sample.answers)
    return Score(best(token_f1, reply, sample.answers), {"rougeL": rouge, "em": em})


# --- CNN/DailyMail --------------------------------------------------------------------------------------------------


def build_news(request: Request) -> Draft:
    """The highlights of one article."""
    record = _pick(request, _records(request, "cnn_dailymail"))
    question = "Write the highlights of this article in three or four short sentences, one on each line."
    document = request.counter.middle_out(record["article"], request.room(question, SUMMARY_TOKENS))
    return Draft(document, question, ("\n".join(record["highlights"]),), details={"id": record["id"]})


def score_news(sample: Sample, reply: str) -> Score:
    """Summary-level ROUGE-L (rougeLsum, stemmed, a sentence a line), as papers report it; ROUGE-1 and -2 beside it."""
    gold = sample.answers[0]
    said = "\n".join(piece.strip() for line in reply.split("\n") for piece in split_sentences(line))
    parts = {"rouge1": rouge_n(reply, gold, 1, stem=True).f1, "rouge2": rouge_n(reply, gold, 2, stem=True).f1}
    return Score(rouge_lsum(said, gold, stem=True).f1, parts)


# --- LongBench ------------------------------------------------------------------------------------------------------

_QUESTION = "Answer the question from the text above, with the answer only.\nQuestion: "
_SUMMARY = "Write a one-page summary of the text above. "
_EXAMPLES = "Go on as in the examples above.\n"


def _f1(sample: Sample, reply: str) -> float:
    return best(token_f1, reply, sample.answers)


def _rouge(sample: Sample, reply: str) -> float:
    return best(lambda said, gold: rouge_l(said, gold).f1, reply, sample.answers)


def _first_line(reply: str) -> str:
    return reply.lstrip("\n").split("\n")[0]


def _classes(sample: Sample, reply: str) -> float:
    classes = sample.details["classes"]
    return best(lambda said, gold: longbench_classification(said, gold, classes), _first_line(reply), sample.answers)


def _numbers(sample: Sample, reply: str) -> float:
    return best(longbench_numbers, reply, sample.answers)


def _code(sample: Sample, reply: str) -> float:
    return best(longbench_code, reply, sample.answers)


_LONGBENCH: dict[str, tuple[str, int, Callable[[Sample, str], float]]] = {
    "narrativeqa": (_QUESTION, 128, _f1),
    "qasper": (_QUESTION, 128, _f1),
    "multifieldqa_en": (_QUESTION, 64, _f1),
    "hotpotqa": (_QUESTION, 32, _f1),
    "2wikimqa": (_QUESTION, 32, _f1),
    "musique": (_QUESTION, 32, _f1),
    "gov_report": (_SUMMARY, 512, _rouge),
    "qmsum": (_SUMMARY + "Answer this query: ", 512, _rouge),
    "multi_news": (_SUMMARY, 512, _rouge),
    "trec": (_EXAMPLES, 64, _classes),
    "triviaqa": (_EXAMPLES, 32, lambda sample, reply: _f1(sample, _first_line(reply))),
    "samsum": (_EXAMPLES, 128, lambda sample, reply: _rouge(sample, _first_line(reply))),
    "passage_count": ("How many different paragraphs are there above? Answer with the number only. ", 32, _numbers),
    "passage_retrieval_en": ("From which paragraph above is this summary? Answer as Paragraph N.\n", 32, _numbers),
    "lcc": ("Write the next line of code only.\n", 64, _code),
    "repobench-p": ("Write the next line of code only.\n", 64, _code),
}


def build_longbench(name: str, request: Request) -> Draft:
    """One item, its middle cut away if it is too long."""
    records = [record for record in _records(request, "longbench") if record["task"].removesuffix("_e") == name]
    if not records:
        raise SettingError(f"the cache holds no LongBench records of {name}; run `mgam data fetch longbench --again`")
    record = _pick(request, records)
    words, tokens, _ = _LONGBENCH[name]
    question = (words + record["question"]).strip()
    document = request.counter.middle_out(record["context"], request.room(question, tokens))
    details = {"id": record["id"], "classes": record["classes"]}
    return Draft(document, question, tuple(record["answers"]), details=details)


def score_longbench(name: str, sample: Sample, reply: str) -> Score:
    """The task's official score, but for summaries: rouge-score's ROUGE-L in place of the `rouge` package's."""
    return Score(_LONGBENCH[name][2](sample, reply), {"found": any_found(reply, sample.answers)})


def _register() -> None:
    groups = ("published",)
    register(
        Task(
            "hotpotqa", "two-hop questions over Wikipedia paragraphs", "arXiv 1809.09600", groups, ANSWER_TOKENS,
            build_hotpot, score_hotpot, needs="hotpotqa",
        )
    )  # fmt: skip
    register(
        Task(
            "narrativeqa", "questions about whole books and scripts", "arXiv 1712.07040", groups, STORY_TOKENS,
            build_narrative, score_narrative, needs="narrativeqa",
        )
    )  # fmt: skip
    register(
        Task(
            "cnn_dailymail", "highlights of news articles", "arXiv 1704.04368", groups, SUMMARY_TOKENS,
            build_news, score_news, needs="cnn_dailymail",
        )
    )  # fmt: skip
    for name, (_, tokens, _) in _LONGBENCH.items():
        register(
            Task(
                f"longbench_{name}", f"LongBench {name}", "arXiv 2308.14508", (*groups, "longbench"), tokens,
                partial(build_longbench, name), partial(score_longbench, name), needs="longbench",
            )
        )  # fmt: skip


_register()

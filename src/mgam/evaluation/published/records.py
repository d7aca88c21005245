"""Records of published data sets, checked field by field, whichever of their forms they come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


class RecordError(ValueError):
    """A record lacks a field, or has it in another form; the message names the field."""


@dataclass(frozen=True)
class Hotpot:
    """One question of HotpotQA (Yang et al. 2018, arXiv 1809.09600)."""

    id: str
    question: str
    answer: str
    paragraphs: tuple[tuple[str, tuple[str, ...]], ...]  # title and sentences, which carry their own leading blanks
    facts: tuple[tuple[str, int], ...]  # title and number of each supporting sentence that exists


@dataclass(frozen=True)
class Narrative:
    """One question of NarrativeQA (Kocisky et al. 2018, arXiv 1712.07040)."""

    id: str
    question: str
    answers: tuple[str, ...]
    story: str


@dataclass(frozen=True)
class News:
    """One article of CNN/DailyMail (See et al. 2017, arXiv 1704.04368), non-anonymised."""

    id: str
    article: str
    highlights: tuple[str, ...]  # one sentence each


@dataclass(frozen=True)
class LongBench:
    """One item of LongBench (Bai et al. 2023, arXiv 2308.14508)."""

    id: str
    task: str
    question: str  # may be empty: the task itself says what to do
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


def hotpot(raw: Mapping[str, Any]) -> Hotpot:
    """The hub's form (columns inside fields) and the raw form (lists of pairs) give equal records."""
    context, facts = _field(raw, "context"), _field(raw, "supporting_facts")
    if isinstance(context, Mapping):
        context = _pairs(context, "context", "title", "sentences")
    if isinstance(facts, Mapping):
        facts = _pairs(facts, "supporting_facts", "title", "sent_id")
    paragraphs = tuple((str(title), tuple(str(one) for one in sentences)) for title, sentences in context)
    sizes = {title: len(sentences) for title, sentences in paragraphs}
    kept = tuple((str(title), int(number)) for title, number in facts if int(number) < sizes.get(str(title), 0))
    if not paragraphs:
        raise RecordError("context: no paragraph")
    return Hotpot(_text(raw, "id", "_id"), _text(raw, "question"), _text(raw, "answer"), paragraphs, kept)


def _pairs(columns: Mapping[str, Any], name: str, left: str, right: str) -> list[tuple[Any, Any]]:
    first, second = _field(columns, left), _field(columns, right)
    if len(first) != len(second):
        raise RecordError(f"{name}: {len(first)} of {left} and {len(second)} of {right}")
    return list(zip(first, second, strict=True))


def narrative(raw: Mapping[str, Any]) -> Narrative:
    """The hub's form; text outside the story's own start and end (licences, contents) is cut away."""
    document = _field(raw, "document")
    story = str(_field(document, "text"))
    start, end = (str(document.get(name) or "") for name in ("start", "end"))
    begin = story.find(start) if start else 0
    stop = story.rfind(end) if end else -1
    story = story[max(0, begin) : stop + len(end) if stop > begin else len(story)]
    answers = tuple(str(_field(answer, "text")).strip() for answer in _field(raw, "answers"))
    if not story.strip() or not any(answers):
        raise RecordError("document.text or answers: empty")
    question = str(_field(_field(raw, "question"), "text")).strip()
    return Narrative(f"{_text(document, 'id')}-{question[:60]}", question, answers, story)


def news(raw: Mapping[str, Any]) -> News:
    """The hub's form; an empty article is refused (114 of them are known)."""
    lines = tuple(line.strip() for line in _text(raw, "highlights").split("\n") if line.strip())
    return News(_text(raw, "id"), _text(raw, "article"), lines)


def longbench(raw: Mapping[str, Any]) -> LongBench:
    """The authors' form (question in `input`) and the parquet copy (in `question`)."""
    question = raw.get("input", raw.get("question"))
    if question is None:
        raise RecordError("input (or question): missing")
    answers = _field(raw, "answers")
    if not isinstance(answers, list) or not answers:
        raise RecordError("answers: not a list with something in it")
    classes = tuple(str(one) for one in raw.get("all_classes") or ())
    return LongBench(
        _text(raw, "_id", "id"),
        _text(raw, "dataset"),
        str(question),
        _text(raw, "context"),
        tuple(map(str, answers)),
        classes,
    )


PARSERS: dict[str, Callable[[Mapping[str, Any]], Hotpot | Narrative | News | LongBench]] = {
    "hotpotqa": hotpot,
    "narrativeqa": narrative,
    "cnn_dailymail": news,
    "longbench": longbench,
}


def plain(record: Hotpot | Narrative | News | LongBench) -> dict[str, Any]:
    """A record as JSON keeps it."""
    return asdict(record)


def _field(raw: Mapping[str, Any], name: str) -> Any:
    if name not in raw or raw[name] is None:
        raise RecordError(f"{name}: missing")
    return raw[name]


def _text(raw: Mapping[str, Any], *names: str) -> str:
    found = next((raw[name] for name in names if raw.get(name) is not None), None)
    if found is None or not str(found).strip():
        raise RecordError(f"{' or '.join(names)}: missing or empty")
    return str(found)

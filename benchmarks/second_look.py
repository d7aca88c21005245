"""What chooses in a second look and in the closer look after it: right answers by each way, each text read once.

    python benchmarks/second_look.py OUT.jsonl facts_by_name:32768:0:60 facts_by_name:8192:0:30 needle_prose:32768:0:15

A cell is TASK:TOKENS:FIRST:COUNT: samples as `mgam eval --keep-out 64,768 --prose novels` makes them, but of the TUNE
split, unless `--split test` is given. Each is asked as `mgam ask` asks, with the choosing changed:

    second:attention    a second look by attention alone, no closer look
    second:both         by attention and words, no closer look
    closer:128          after that a closer look, of which the surer answer counts: from all, or from 128 tokens of it
    closer:256+64       the surest of three, as `mgam ask` does it

A text that is too short for a second look is answered at first sight in every way. `--ways` names some, commas between.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mgam
from mgam.cli.digests import AGAIN, adapter_of
from mgam.documents import asking, closer_look, read_texts
from mgam.documents.prompt import build
from mgam.documents.read_texts import ReadTexts
from mgam.documents.sources import Source
from mgam.evaluation.machine import conditions
from mgam.evaluation.registry import Task, find_tasks
from mgam.evaluation.sample import Request, Sample
from mgam.evaluation.splits import Split
from mgam.evaluation.texts import Text, TextLibrary
from mgam.evaluation.tokens import TokenCounter
from mgam.integrations.loading import load
from mgam.integrations.transformers.apply import applied_to
from mgam.record import Record

KEEP_OUT = (64, 768)
WAYS = ("second:attention", "second:both", *(f"closer:{widths}" for widths in ("512", "256", "128", "64", "256+64")))
_WAY = re.compile(r"second:(attention|both)|closer:[1-9]\d*(\+[1-9]\d*)*")


class OneSplit(TextLibrary):
    """Gives every task the documents of one split."""

    def __init__(self, split: Split) -> None:
        super().__init__(prose="novels")
        self.split = split

    def for_tasks(self, source: str) -> tuple[Text, ...]:
        return self.texts(source, self.split)

    def records(self, source: str, split: Split | None = None) -> dict[str, dict[str, Any]]:
        return super().records(source, self.split)


@contextmanager
def choosing(way: str) -> Iterator[None]:
    """Meanwhile looks choose as a way says."""
    look, how = way.split(":")
    with ExitStack() as changes:
        if look == "second":
            changes.enter_context(patch.object(asking, "closer", return_value=None))
            if how == "attention":  # None in place of an order: that of attention
                changes.enter_context(patch.object(read_texts, "best_first", return_value=None))
        else:
            widths = tuple(sorted(map(int, how.split("+")), reverse=True))
            changes.enter_context(patch.object(closer_look, "WIDTHS", widths))
        yield


def answers(model: Any, tokenizer: Any, task: Task, sample: Sample, ways: list[str]) -> dict[str, dict[str, Any]]:
    """By way: whether the answer is right, whether all of the evidence was read again, and what was answered."""
    source = Source("document", sample.document)
    prompt = build(tokenizer, [source], sample.question)
    room, gold = len(prompt.ids) + sample.max_new_tokens, [sample.document[slice(*span)] for span in sample.spans]
    texts = ReadTexts.of(model, prompt, room, Record(evidence_from=prompt.document), keep=True, on_progress=None)
    found = {}
    for way in ways:
        with choosing(way):
            looked, again = texts.look(model, tokenizer, prompt, 3), None
            if looked is None:
                answer = asking.ask(model, tokenizer, [source], sample.question, max_new_tokens=sample.max_new_tokens)
            else:
                first, chosen = looked
                again = all(any(line in one.text for one in chosen.sources) for line in gold)
                answer = asking.at_second_sight(
                    model, tokenizer, chosen, sample.question, first, len(prompt.ids), sample.max_new_tokens, None
                )
        right, tokens = task.score(sample, answer.answer).value, {**answer.tokens, "document": prompt.document}
        found[way] = {"right": right, "read again": again, "answer": answer.answer, "tokens": tokens,
                      "confidence": answer.confidence}  # fmt: skip
    return found


def table(cells: dict[str, list[dict[str, dict[str, Any]]]], ways: list[str]) -> str:
    """Right answers by way and cell; in brackets in how many all of the evidence was read again."""
    lines = [f"| | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for way in ways:
        counts = []
        for asked in cells.values():
            right, again = ([one[way][what] for one in asked] for what in ("right", "read again"))
            counts.append(f"{sum(right):g} of {len(asked)}" + ("" if None in again else f" ({sum(again)})"))
        lines.append(f"| {way} | {' | '.join(counts)} |")
    return "\n".join(lines)


def main() -> None:
    """Asks, writes lines as they come, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("cells", nargs="+", metavar="TASK:TOKENS:FIRST:COUNT")
    parser.add_argument("--split", choices=("tune", "test"), default="tune")
    parser.add_argument("--model", default=None, help="hub id, folder or GGUF file")
    parser.add_argument("--ways", default=",".join(WAYS), help="commas between; of %(default)s")
    given = parser.parse_args()
    ways = given.ways.split(",")
    if unknown := [way for way in ways if not _WAY.fullmatch(way)]:
        parser.error(f"{unknown[0]!r} is no way; give some like {', '.join(WAYS)}")
    model, tokenizer = load(given.model)
    mgam.apply(model, reread=AGAIN, **adapter_of(model, None))
    library, counter = OneSplit(given.split), TokenCounter(tokenizer)
    done: dict[str, list[dict[str, dict[str, Any]]]] = {}
    with given.out.open("a", encoding="utf-8") as file:
        run = {**conditions(str(model.device)), "split": given.split, **asking.settings_of(model, applied_to(model))}
        file.write(json.dumps({"run": run}, default=str) + "\n")
        for cell in given.cells:
            name, *numbers = cell.split(":")
            (task,), (tokens, first, count) = find_tasks([name]), map(int, numbers)
            for index in range(first, first + count):
                sample = task.sample(Request(name, tokens, 0, index, counter, library, KEEP_OUT))
                found = answers(model, tokenizer, task, sample, ways)
                line = {"sample": sample.id, "question": sample.question, "gold": sample.answers, "ways": found}
                print(json.dumps(line), file=file, flush=True)
                done.setdefault(f"{name} {tokens}", []).append(found)
                print(sample.id, {way: one["right"] for way, one in found.items()}, flush=True)
    print(table(done, ways))


if __name__ == "__main__":
    main()

"""Does confidence tell whether an answer stands in a text?

    mgam data fetch novels speeches essays
    python experiments/not_found/run.py ask --split tune --out tune.jsonl
    python experiments/not_found/run.py report tune.jsonl

Each text is real prose with three invented facts in it; three questions are asked of these and three of facts that it
does not hold. With `--facts countries` it is profiles of countries, and three questions are of countries that it does
not tell of. Tuning and testing have other texts and other facts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mgam
from mgam.documents.asking import ask_each
from mgam.documents.confidence import FOUND, FOUND_AGAIN
from mgam.documents.sources import Source
from mgam.evaluation.almanac import FACTS as ALMANAC
from mgam.evaluation.almanac import Profile
from mgam.evaluation.splits import Split
from mgam.evaluation.texts import TextLibrary
from mgam.integrations.loading import load

PROSE = ("novels", "speeches", "essays")
INVENTED = json.loads((Path(__file__).parent / "facts.json").read_text(encoding="utf-8"))
FACTS: list[tuple[str, str, str]] = INVENTED["facts"]
"""A statement with room for a value, its question, and the kind of value. The first half tunes, the second tests."""
Made = tuple[str, list[str], dict[str, str]]
"""A text, questions, and what answers those of them that it does answer."""
THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    """Asks, or reports what was asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    asking = what.add_parser("ask")
    asking.add_argument("--split", choices=("tune", "test"), required=True)
    asking.add_argument("--documents", type=int, default=24)
    asking.add_argument("--tokens", type=int, default=1200, help="of prose in each text")
    asking.add_argument("--model", default=None)
    asking.add_argument("--adapter", default=None, help="low-rank adapters to read with, as mgam ask takes them")
    asking.add_argument("--reread", type=int, default=0, help="tokens that are read a second time, as mgam ask does")
    asking.add_argument("--facts", choices=("hidden", "countries"), default="hidden", help="what is asked for")
    asking.add_argument("--out", type=Path, required=True)
    what.add_parser("report").add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    if given.what == "ask":
        make = like_facts if given.facts == "countries" else hidden_facts
        ask_all(make, given.split, given.documents, given.tokens, given.model, given.adapter, given.reread, given.out)
    else:
        rows = [json.loads(line) for file in given.files for line in file.read_text(encoding="utf-8").splitlines()]
        report(rows)


def hidden_facts(library: TextLibrary, split: Split, tokens: int, tokenizer: Any, rng: random.Random) -> Made:
    """Prose with three facts in it, and questions of these and of three others."""
    facts = FACTS[: len(FACTS) // 2] if split == "tune" else FACTS[len(FACTS) // 2 :]
    texts = [text for source in PROSE if library.has(source) for text in library.texts(source, split)]
    prose = cut(library.sentences(rng.choice(texts)), tokens, tokenizer, rng)
    chosen = rng.sample(facts, 6)
    held = {question: value(kind, rng) for _, question, kind in chosen[:3]}
    for statement, question, _ in chosen[:3]:
        prose.insert(rng.randrange(len(prose)), " " + statement.format(held[question]))
    return "".join(prose).strip(), [question for _, question, _ in chosen], held


def like_facts(library: TextLibrary, split: Split, tokens: int, tokenizer: Any, rng: random.Random) -> Made:
    """Profiles of countries, and questions of three of them and of three others."""
    records = library.records("factbook", split).items()
    usable = [one for code, record in records if (one := Profile(code, record)).usable]
    rng.shuffle(usable)
    text, told = "", 0
    while told < len(usable) - 3 and len(tokenizer(text).input_ids) < tokens:
        text += f"\n\n{usable[told].name}" + "".join(usable[told].short_lines)
        told += 1
    held: dict[str, str] = {}
    questions: list[str] = []
    for there, one in [(True, one) for one in rng.sample(usable[:told], 3)] + [(False, one) for one in usable[-3:]]:
        fact = rng.choice([fact for fact in ALMANAC if one.answer(fact)])
        questions.append(fact.asked.format(of=f"of {one.name}"))
        if there:
            held[questions[-1]] = one.answer(fact)
    return text.strip(), questions, held


def ask_all(
    make: Callable[[TextLibrary, Split, int, Any, random.Random], Made], split: Split, documents: int, tokens: int,
    name: str | None, adapter: str | None, reread: int, out: Path,
) -> None:  # fmt: skip
    """Adds a line of JSON for each question."""
    model, tokenizer = load(name)
    mgam.apply(model, adapter=adapter, reread=reread)
    library, rng = TextLibrary(), random.Random(split)
    with out.open("a", encoding="utf-8") as file:
        for _ in range(documents):
            text, questions, held = make(library, split, tokens, tokenizer, rng)
            source = Source("text", text)
            for question, answer in zip(
                questions, ask_each(model, tokenizer, [source], questions, max_new_tokens=24), strict=True
            ):
                there = question in held
                row = {
                    "question": question,
                    "there": there,
                    "right": there and plain(held[question]) in plain(answer.answer),
                    "answer": answer.answer,
                    "confidence": answer.confidence,
                    "top": answer.evidence[0].share if answer.evidence else None,
                    "tokens": answer.tokens["document"],
                }
                file.write(json.dumps(row) + "\n")
                file.flush()


def cut(sentences: Sequence[str], tokens: int, tokenizer: Any, rng: random.Random) -> list[str]:
    """Sentences of about so many tokens, from a place that is drawn."""
    taken: list[str] = []
    count = 0
    for sentence in sentences[rng.randrange(max(1, len(sentences) - 400)) :]:
        taken.append(sentence)
        count += len(tokenizer(sentence).input_ids)
        if count >= tokens:
            break
    return taken


def value(kind: str, rng: random.Random) -> str:
    """A value of a kind."""
    return str(rng.randrange(1000, 99999)) if kind == "number" else rng.choice(INVENTED["values"][kind])


def plain(text: str) -> str:
    """Letters and digits that are compared."""
    return text.lower().replace(",", "")


def report(rows: list[dict[str, Any]]) -> None:
    """How well confidence separates, and what each threshold would mark as not found."""
    absent, right = [row for row in rows if not row["there"]], [row for row in rows if row["right"]]
    print(f"{len(rows)} questions, {len(rows) - len(absent)} facts in the text, {len(right)} answered rightly")
    print(f"area under the curve, right answers against absent facts: {area(right, absent, confidence):.2f}")
    if all(row["top"] is not None for row in rows):
        print(f"the same by the share of the first passage: {area(right, absent, lambda row: row['top']):.2f}")
    print(f"\n| below | marked | of these not right | absent facts marked | right answers marked |\n{'|---' * 5}|")
    named = {FOUND: " (FOUND)", FOUND_AGAIN: " (FOUND_AGAIN)"}
    for threshold in sorted({*THRESHOLDS, *named}):
        marked = [row for row in rows if row["confidence"] < threshold]
        wrong = sum(not row["right"] for row in marked) / max(1, len(marked))
        missing = sum(not row["there"] for row in marked)
        lost = sum(row["right"] for row in marked)
        print(
            f"| {threshold}{named.get(threshold, '')} | {len(marked)} | {wrong:.0%} "
            f"| {missing} of {len(absent)} | {lost} of {len(right)} |"
        )


def confidence(row: dict[str, Any]) -> float:
    """What is judged."""
    return float(row["confidence"])


def area(high: Sequence[dict[str, Any]], low: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    """How often one of `high` stands above one of `low`."""
    pairs = [(of(a) > of(b)) + (of(a) == of(b)) / 2 for a in high for b in low]
    return sum(pairs) / max(1, len(pairs))


if __name__ == "__main__":
    main()

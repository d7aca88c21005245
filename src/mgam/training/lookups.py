"""Long texts with facts hidden in them, and questions about these: where each answer stands is known."""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mgam.documents.prompt import AFTER, BEFORE
from mgam.errors import SettingError
from mgam.evaluation.almanac import FACTS, Profile
from mgam.evaluation.texts import TextLibrary, split_sentences
from mgam.training.alike import countries, descriptions, invented, told
from mgam.training.texts import read_texts
from mgam.training.wordings import ALMANAC, BRIEFLY, QUOTES, Pair, fact

PER_QUESTION = 128
"""Tokens of a text of like facts for each question about it, of which there are up to three times as many as about
others: a question costs little beside its text."""


@dataclass(frozen=True)
class Asked:
    """A question in a lookup, in tokens: all of it up to the answer, the answer, and where it stands in the text; that
    is (0, 0) where the text does not hold it."""

    question: tuple[int, int]
    answer: tuple[int, int]
    evidence: tuple[int, int]


@dataclass(frozen=True)
class Lookup:
    """A text and questions as one dialogue: ids (T,), of which the first `document` are instructions and text."""

    ids: Tensor
    document: int
    asked: tuple[Asked, ...]
    prose: bool = True
    """Whether to go on with the text is worth learning: what is invented, field by field, nobody could guess."""

    @property
    def drawn(self) -> int:
        """A number that the text decides, to draw by."""
        return int(self.ids.sum()) * 7919


class LookupMaker:
    """Makes lookups from TRAIN texts; number n of a seed and a length is the same whenever it is asked for."""

    def __init__(
        self,
        tokenizer: Any,
        sources: Sequence[str],
        seed: int = 0,
        library: TextLibrary | None = None,
        quotes: float = 0.0,
        alike: float = 0.0,
    ) -> None:
        """`quotes` is the part of all questions about prose that ask how one of its own sentences goes on; `alike` the
        part of all texts that hold many like facts."""
        library = library or TextLibrary()
        self.tokenizer, self.seed, self.quotes, self.alike = tokenizer, seed, quotes, alike
        prose = [source for source in sources if source != "factbook"]
        texts = read_texts(prose, "train", library) if prose else []
        self.sentences = [pieces for _, text in texts if len(pieces := list(split_sentences(text))) > 50]
        self.profiles: list[Profile] = []
        if "factbook" in sources:
            records = library.records("factbook", "train").items()
            self.profiles = [profile for code, one in records if (profile := Profile(code, one)).usable]
        if not self.sentences:
            raise SettingError(
                f"{', '.join(sources)} hold no prose of more than 50 sentences to hide facts in; give --data novels, "
                "after: mgam data fetch novels"
            )
        self._sizes = [sum(map(len, pieces)) for pieces in self.sentences]

    @property
    def described(self) -> dict[str, Any]:
        """What tells its lookups from those of another maker of the same texts."""
        return {"texts": self.seed, "quotes": self.quotes, "alike": self.alike}

    def make(self, number: int, tokens: int, questions: int) -> Lookup:
        """A lookup of at most `tokens` tokens, and nearly as many."""
        rng = random.Random(f"{self.seed}/{number}/{tokens}")
        alike = self.alike > 0 and rng.random() < self.alike
        profiles = not alike and bool(self.profiles) and rng.random() < 0.25
        questions = min(rng.choice((1, 3)) * questions, tokens // PER_QUESTION) if alike else questions
        room = tokens - (32 if alike else 64) * questions - 120
        characters = int(room * (3.0 if alike else 3.9))
        for attempt in range(12):
            if alike:
                text, pairs = self._alike(random.Random(f"{self.seed}/{number}/alike"), characters, questions)
                alike = bool(pairs) and attempt < 8
            if not alike:
                text, pairs = (self._dossier if profiles else self._prose)(rng, characters, questions)
            found = replace(self._encode(text, pairs), prose=not alike)
            if len(found.ids) <= tokens:
                return found
            over = len(found.ids) - tokens  # questions stay as long as they are: the text gives way
            characters -= int(characters * (0.06 + 1.1 * over / found.document)) + 1  # and pieces may be long
            if characters <= 0:
                break
        raise SettingError(f"no lookup of {tokens} tokens can be made; raise the length")

    def _alike(self, rng: random.Random, characters: int, questions: int) -> tuple[str, list[Pair]]:
        which = rng.random() * (1.0 if self.profiles else 0.55)
        if which < 0.4:
            return invented(rng, characters, questions, lambda drawn, many: "".join(self._running(drawn, many)))
        if which < 0.55:
            return told(rng, questions, self._running(rng, characters))
        return (countries if which < 0.85 else descriptions)(rng, characters, questions, self.profiles)

    def _running(self, rng: random.Random, characters: int) -> list[str]:
        """Sentences of texts, from a place that is drawn, of at least so many characters."""
        pieces = rng.choices(self.sentences, weights=self._sizes)[0]
        start = rng.randrange(len(pieces))
        chosen: list[str] = []
        have = 0
        while have < characters:
            for piece in pieces[start:]:
                chosen.append(piece)
                have += len(piece)
                if have >= characters:
                    break
            pieces, start = rng.choices(self.sentences, weights=self._sizes)[0], 0
        return chosen

    def _prose(self, rng: random.Random, characters: int, questions: int) -> tuple[str, list[Pair]]:
        chosen = self._running(rng, characters)
        quoted = sum(rng.random() < self.quotes for _ in range(questions)) if self.quotes else 0
        quoted = min(quoted, questions - 1)  # a text may have nothing to quote
        facts = [fact(rng) for _ in range(questions - quoted)]
        places = sorted(rng.randrange(len(chosen)) for _ in facts)
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        begins: list[int] = []
        length, hidden = 0, list(zip(places, facts, strict=True))[::-1]
        for place, piece in enumerate(chosen):
            while hidden and hidden[-1][0] == place:
                statement = hidden.pop()[1].statement
                parts.append(" " + statement)
                spans.append((length + 1, length + 1 + len(statement)))
                length += 1 + len(statement)
            parts.append(piece)
            begins.append(length)
            length += len(piece)
        text = "".join(parts)
        pairs = [Pair(one.question, one.answer, span) for one, span in zip(facts, spans, strict=True)]
        for place in rng.sample(range(len(chosen)), min(len(chosen), 4 * quoted)):
            if len(pairs) < questions and (pair := _quote(rng, text, begins[place], chosen[place])) is not None:
                pairs.append(pair)
        rng.shuffle(pairs)
        return text, pairs

    def _dossier(self, rng: random.Random, characters: int, questions: int) -> tuple[str, list[Pair]]:
        count = min(len(self.profiles), max(4, characters // 9000))
        chosen = rng.sample(self.profiles, count)
        parts: list[str] = []
        answers: list[Pair] = []
        length = 0
        for number, profile in enumerate(chosen):
            share = (characters - length) // (count - number)
            ident = f"{rng.randrange(0x100000, 0x1000000):06x}"
            lines = [f"{chr(10) * 2 if parts else ''}Document {ident}: {profile.name}"]
            used = len(lines[0])
            told = {f"\n{one.label}: {profile.get(one.path)}": one for one in FACTS if profile.answer(one)}
            for line in profile.short_lines:
                if (one := told.get(line)) is not None:
                    asked = rng.choice(ALMANAC[one.label]).format(of=rng.choice((
                        f"of {profile.name}", f"in {profile.name}", f"of the country in document {ident}"
                    )))  # fmt: skip
                    brief = rng.choice(BRIEFLY["text"])
                    span = (length + used + 1, length + used + len(line))
                    answers.append(Pair(asked + brief, profile.answer(one), span))
                lines.append(line)
                used += len(line)
            for line in profile.long_lines:
                if used + len(line) <= share:
                    lines.append(line)
                    used += len(line)
            parts += lines
            length += used
        return "".join(parts), rng.sample(answers, min(questions, len(answers)))

    def _encode(self, text: str, pairs: Sequence[Pair]) -> Lookup:
        written, origin, marks = self._write(text, pairs)
        encoded = self.tokenizer(written, add_special_tokens=not self._template, return_offsets_mapping=True)
        begins = [begin for begin, _ in encoded["offset_mapping"]]
        ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max))

        def tokens(first: int, last: int) -> tuple[int, int]:
            return bisect_right(ends, first), bisect_left(begins, last)

        asked = []
        for pair, (question, answer, stop) in zip(pairs, marks, strict=True):
            begin, end = pair.evidence
            there = tokens(origin + begin, origin + end) if end else (0, 0)
            asked.append(Asked(tokens(question, answer), tokens(answer, stop), there))
        document = tokens(0, origin + len(text))[1]
        return Lookup(torch.tensor(encoded["input_ids"]), document, tuple(asked))

    @property
    def _template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _write(self, text: str, pairs: Sequence[Pair]) -> tuple[str, int, list[tuple[int, int, int]]]:
        """The dialogue; where the text begins in it; and of each pair where question, answer and what follows begin."""
        marks = []
        if not self._template:
            written = BEFORE + text
            for pair in pairs:
                begin = len(written) + len(AFTER)
                written += f"{AFTER}{pair.question}\nAnswer:"
                marks.append((begin, len(written), len(written) + 1 + len(pair.answer)))
                written += f" {pair.answer}"
            return written, len(BEFORE), marks
        written, messages = "", []
        for number, pair in enumerate(pairs):
            messages.append({"role": "user", "content": (BEFORE + text + AFTER if not number else "") + pair.question})
            before = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            question = before.rindex(pair.question)
            messages.append({"role": "assistant", "content": pair.answer})
            written = self.tokenizer.apply_chat_template(messages, tokenize=False)
            stop = written.index(pair.answer, len(before)) + len(pair.answer)
            after = len(written) - len(written[stop:].lstrip()) if not written[stop:].strip() else len(written.rstrip())
            marks.append((question, len(before), after))
        return written, written.index(text), marks


def _quote(rng: random.Random, text: str, begin: int, sentence: str) -> Pair | None:
    """Asks how a sentence of the text goes on; None where it is too short, or begins as another does."""
    words = list(re.finditer(r"\S+", sentence))
    opening, more = rng.randint(4, 7), rng.randint(3, 6)
    if len(words) < opening + more:
        return None
    first, last, stop = words[0].start(), words[opening - 1].end(), words[opening + more - 1].end()
    if text.count(sentence[first:last]) != 1:
        return None
    said = " ".join(sentence[first:last].split())
    answer = " ".join(sentence[last:stop].split())
    question = rng.choice(QUOTES).format(said=said, more=more)
    return Pair(question, answer, (begin + first, begin + stop))

"""How many KV heads open the chunk that holds a needle, by policy: where retrieval is lost before any answer is.

    python benchmarks/needle_recall.py MODEL|- TEXT TOKENS TEXTS OUT.jsonl [POLICY ...]

TEXT is a file of prose (not of a TEST split). Facts in wordings of training are hidden in stretches of it, four a text.
The training-free search reads the text; then, on the same states, every policy chooses for the last block of the
question and for the token before the answer's first figure. POLICY is a folder that mgam fit wrote, read as it was
fitted and with several parts of the budget for content. MODEL - is the default model.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mgam
from mgam.documents.prompt import build
from mgam.documents.sources import Source
from mgam.evaluation.texts import split_sentences
from mgam.integrations.loading import load
from mgam.integrations.transformers.apply import applied_to
from mgam.levels import Levels
from mgam.policies import Scored, Voters
from mgam.policies.base import Policy
from mgam.policies.files import FittedPolicy
from mgam.policies.learned import Learned
from mgam.policies.learned_search import SearchWeights
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Piece, Schedule, Span
from mgam.training.reading import shown
from mgam.training.wordings import training_words

FACTS = 4
THINGS = ("account", "parcel", "ticket", "file", "invoice", "licence", "locker", "archive", "strongbox", "cabinet")
BUDGET, WINDOW, QUESTION_BLOCK = 1024, 512, 32
LEVELS = Levels((1, 64, 1024), 4)
CALL = 2048
PARTS = (None, 0.0, 0.5, 1.0)


def facts(rng: random.Random) -> list[tuple[str, str, str]]:
    """Sentence, question, and the answer up to its first figure."""
    found = []
    for thing in rng.sample(THINGS, FACTS):
        key, value = "-".join(rng.sample(training_words(), 2)), rng.randrange(10**5, 10**7)
        question = f"What is the {thing} number of {key}?"
        found.append((f" Note: the {thing} number of {key} is {value}.", question, f"The {thing} number of {key} is"))
    return found


def stretch(sentences: list[str], characters: int, rng: random.Random) -> tuple[str, list[tuple[str, str, str]]]:
    """Prose with facts hidden in it, none near its ends."""
    first = rng.randrange(max(1, len(sentences) - characters // 40))
    chosen: list[str] = []
    while sum(map(len, chosen)) < characters and first + len(chosen) < len(sentences):
        chosen.append(sentences[first + len(chosen)])
    made = facts(rng)
    for sentence, _, _ in made:
        chosen.insert(int(rng.uniform(0.08, 0.84) * len(chosen)), sentence)
    return "".join(chosen), made


@torch.no_grad()
def opened(model: Any, tokenizer: Any, text: str, made: Any, policies: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One line a fact: share of KV heads that open its chunk, by layer and policy, for the question and the answer."""
    block = applied_to(model).settings.block
    prompts = [build(tokenizer, [Source("text", text)], question) for _, question, _ in made]
    document = min(prompt.document for prompt in prompts)
    cache = mgam.PyramidCache(model, [Schedule((Span(document, block, "block"), Span(None, 1)))])
    told: dict[int, list[Tensor]] = {}
    for first in range(0, document, CALL):
        call = torch.tensor([prompts[0].ids[first : min(first + CALL, document)]], device=model.device)
        with shown(model, lambda layer, query, key: told.setdefault(layer, []).append(key)):
            model.get_decoder()(input_ids=call, past_key_values=cache)
    keys, place = {layer: torch.cat(parts, 2) for layer, parts in told.items()}, cache.bookmark()
    for (sentence, _, reply), prompt in zip(made, prompts, strict=True):
        begin = prompt.starts[0] + text.index(sentence)
        places = [n for n, (low, high) in enumerate(prompt.offsets) if high > begin + 1 and low < begin + len(sentence)]
        ids = [*prompt.ids[document:], *tokenizer(reply, add_special_tokens=False)["input_ids"]]
        spans = Span(document, block, "block"), Span(len(prompt.ids), QUESTION_BLOCK, "block"), Span(None, 1)
        for kept in cache.pyramids.values():
            kept.schedules = [Schedule(spans)]
        asked: dict[int, Tensor] = {}
        with shown(model, lambda layer, query, key, asked=asked: asked.update({layer: query})):
            model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache)
        cache.go_back(place)
        end, last = len(prompt.ids) - document, len(ids)
        votes = {"question": (max(0, end - QUESTION_BLOCK), end), "answer": (last - 1, last)}
        wanted = {spot // LEVELS.chunk for spot in places}
        line: dict[str, Any] = {"tokens": document + last, "depth": round(places[0] / document, 3)}
        for name, make in policies.items():
            for kind, (low, high) in votes.items():
                line[f"{name}, {kind}"] = [
                    round(_share(make(layer, query.shape[-1] ** -0.5), query[:, :, low:high], keys[layer], wanted), 4)
                    for layer, query in asked.items()
                ]
        yield line


def _share(policy: Policy, voters: Tensor, keys: Tensor, wanted: set[int]) -> float:
    """Share of KV heads that open a wanted chunk, for voters (1, H*G, V, D) right after keys (1, H, T, D)."""
    end, votes = keys.shape[2], voters.shape[2]
    blocks = Blocks.of([(0, Piece(end, end + votes, end, end, end + votes, False))])
    there = Voters(voters, torch.ones(1, votes, dtype=torch.bool, device=voters.device))
    cover = policy.choose(there, blocks, Pyramid.of(keys, keys, LEVELS), LEVELS)
    return sum(bool(wanted & set(head.tolist())) for head in cover.opened[0]) / cover.opened.shape[1]


def _learned(layers: dict[int, SearchWeights], content: float | None, layer: int, scale: float) -> Policy:
    return Learned(layers[layer], BUDGET, WINDOW, content=content)


def main() -> None:
    """Writes a line a fact, and says means as they come."""
    name, path, tokens, texts, out, *folders = sys.argv[1:]
    loaded = load(None if name == "-" else name)
    model: Any = loaded.model
    mgam.apply(model, dense_until=min(4096, int(tokens) // 4))
    policies: dict[str, Any] = {"flat search": lambda layer, scale: Scored(BUDGET, WINDOW, scale=scale)}
    for folder in folders:
        layers = FittedPolicy.load(folder).layers
        for part in PARTS:
            name = "as fitted" if part is None else f"content {part}"
            policies[f"{Path(folder).name}, {name}"] = partial(_learned, layers, part)
    sentences = list(split_sentences(Path(path).read_text(encoding="utf-8")))
    found: dict[str, list[float]] = {}
    with Path(out).open("a", encoding="utf-8") as file:
        for number in range(int(texts)):
            text, made = stretch(sentences, int(int(tokens) * 3.9), random.Random(f"needle recall/{number}"))
            for line in opened(model, loaded.tokenizer, text, made, policies):
                file.write(json.dumps({"model": model.name_or_path, "text": number, **line}) + "\n")
                file.flush()
                for key, layers in line.items():
                    if isinstance(layers, list):
                        found.setdefault(key, []).append(sum(layers) / len(layers))
            print({key: round(sum(shares) / len(shares), 3) for key, shares in found.items()}, flush=True)


if __name__ == "__main__":
    main()

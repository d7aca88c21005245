"""A small tokenizer, and an invented world in place of the texts that are fetched."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgam.evaluation.registry import all_tasks
from mgam.evaluation.sample import Request, Sample
from mgam.evaluation.texts import TextLibrary
from mgam.evaluation.tokens import TokenCounter

FIXTURES = Path(__file__).parent / "fixtures"


class WordTokenizer:
    """Tokens are pieces of words of up to six characters, single signs, and the blanks before them."""

    _piece = re.compile(r" ?[A-Za-z]{1,6}|\d{1,3}| ?[^\w\s]|\s|_|[^\W\da-zA-Z]")

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        found = []
        for piece in self._piece.findall(text):
            if piece not in self._ids:
                self._ids[piece] = len(self._texts)
                self._texts.append(piece)
            found.append(self._ids[piece])
        return found

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self._texts[one] for one in ids)


def invented_country(number: int, rng: random.Random, names: list[str]) -> dict[str, object]:
    def text(value: str) -> dict[str, str]:
        return {"text": value}

    regions = ("Northland", "Southland", "Middle Isles")
    landlocked = number % 4 == 0
    borders = ", ".join(f"{other} {rng.randrange(10, 900)} km" for other in rng.sample(names, 3))
    return {
        "Introduction": {"Background": text(" ".join(rng.choices(names, k=400)))},
        "Geography": {
            "Map references": text(regions[number % 3]),
            "Coastline": text("0 km (landlocked)" if landlocked else f"{rng.randrange(20, 9000):,} km"),
            "Land boundaries": {"border countries": text(borders)},
            "Elevation extremes": {"highest point": text(f"Mount {names[number]} {rng.randrange(200, 8000):,} m")},
        },
        "People and Society": {
            "Median age": {"total": text(f"{rng.randrange(150, 500) / 10} years")},
            "Birth rate": text(f"{rng.randrange(700, 4500) / 100} births/1,000 population (2015 est.)"),
            "Population": text(f"{rng.randrange(30_000, 90_000_000):,} (July 2015 est.)"),
        },
        "Government": {
            "Country name": {"conventional short form": text(names[number])},
            "Capital": {"name": text(f"{names[number]} City")},
        },
    }


def invented_articles(rng: random.Random, names: list[str]) -> dict[str, dict[str, str]]:
    def prose(sentences: int) -> str:
        return " ".join(f"The {' '.join(rng.choices(names, k=9))} {rng.randrange(9999)}." for _ in range(sentences))

    return {f"{name}.json": {"title": name, "lead": prose(8), "body": prose(120)} for name in names[:16]}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> TextLibrary:
    """Texts of every source, invented, in the places where `mgam data fetch` would put them."""
    root = tmp_path_factory.mktemp("texts")
    rng = random.Random("an invented world")
    sounds = ["ka", "lo", "mi", "ren", "tos", "vel", "zan", "dur", "esh", "pol"]
    names = ["".join(rng.sample(sounds, 3)).capitalize() for _ in range(60)]
    names = list(dict.fromkeys(names))
    sources: dict[str, dict[str, str]] = {
        "factbook": {f"c{n:02d}.json": json.dumps(invented_country(n, rng, names)) for n in range(len(names))},
        "wikipedia": {name: json.dumps(one) for name, one in invented_articles(rng, names).items()},
        "novels": {f"novel-{n}.txt": " ".join(f"{rng.choice(names)} went on." for _ in range(4000)) for n in range(6)},
        "speeches": {
            f"speech-{n}.txt": " ".join(f"We say {rng.choice(names)}." for _ in range(4000)) for n in range(6)
        },
    }
    for source, files in sources.items():
        (root / source).mkdir()
        for name, text in files.items():
            (root / source / name).write_text(text, encoding="utf-8")
        (root / source / "manifest.json").write_text('{"sha256": "invented"}')
    from mgam.evaluation.fetch import fetch_sources

    for name in ("hotpotqa", "narrativeqa", "cnn_dailymail", "longbench"):
        fetch_sources([name], say=lambda message: None, root=root, files=FIXTURES / name)
    return TextLibrary(root, prose="shipped")


@pytest.fixture(scope="session")
def counter() -> TokenCounter:
    return TokenCounter(WordTokenizer())


class Maker:
    """Makes samples with the invented texts and the small tokenizer."""

    def __init__(self, library: TextLibrary, counter: TokenCounter) -> None:
        self.library, self.counter = library, counter
        self._made: dict[tuple[str, int, int, int], Sample] = {}

    def request(self, task: str, length: int = 2048, seed: int = 0, index: int = 0) -> Request:
        return Request(task, length, seed, index, self.counter, self.library)

    def __call__(self, task: str, length: int = 2048, seed: int = 0, index: int = 0) -> Sample:
        key = (task, length, seed, index)
        if key not in self._made:
            self._made[key] = all_tasks()[task].sample(self.request(*key))
        return self._made[key]


@pytest.fixture(scope="session")
def make(library: TextLibrary, counter: TokenCounter) -> Maker:
    return Maker(library, counter)


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """A model of random weights whose tokens are bytes, and its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )

"""Each head gets the part of its budget for single facts that serves it best."""

from __future__ import annotations

import pytest
import torch

from documents.tiny import make_plain_model, make_tokenizer, text
from mgam.levels import Levels
from mgam.training.content import CANDIDATES, Counts, fit_content
from mgam.training.lessons import Sampling
from mgam.training.lookups import Lookup, LookupMaker
from mgam.training.network import HALF, SearchNetwork

SAMPLING = Sampling(Levels((1, 16, 64), 4), window=32, block=32)


@pytest.fixture(scope="module")
def lookups(tmp_path_factory: pytest.TempPathFactory) -> list[Lookup]:
    """Texts with two questions each."""
    file = tmp_path_factory.mktemp("content") / "prose.txt"
    file.write_text(text(30_000).replace(" .", ".").replace("\n", " "), encoding="utf-8")
    maker = LookupMaker(make_tokenizer(), [str(file)])
    return [maker.make(number, 1536, 2) for number in range(3)]


def counts(found: list[float], kept: list[float]) -> Counts:
    """Of one head, with facts found alike by questions and answers."""
    one = torch.tensor([found])
    return Counts(one * 10, one * 20, torch.tensor([kept]) * 3, 10, 20, torch.tensor([3.0]))


def test_a_head_that_finds_facts_by_content_gives_it_room_and_one_that_does_not_keeps_its_attention() -> None:
    falling = [0.6, 0.5, 0.4, 0.35, 0.3]
    assert counts([0.1, 0.5, 0.9, 0.9, 0.9], falling).best().item() == 0.5
    assert counts([0.1, 0.11, 0.12, 0.12, 0.12], falling).best().item() == 0.0
    assert counts([0.0, 0.1, 0.2, 0.4, 0.9], falling).best().item() == 1.0


def test_of_parts_that_serve_alike_the_lowest_is_taken() -> None:
    assert counts([0.5] * 5, [0.5] * 5).best().item() == CANDIDATES[0]


def test_what_is_counted_lies_between_nothing_and_all_and_is_what_heads_get(lookups: list[Lookup]) -> None:
    model = make_plain_model(window=2048)
    torch.manual_seed(0)
    shape = (model.config.num_key_value_heads, 2, model.config.hidden_size // model.config.num_attention_heads)
    network = SearchNetwork({0: shape, 1: shape}, 6, 0, 6)
    told = fit_content(model, network, lookups, SAMPLING, budget=128)
    assert told["layers"].keys() == {"0", "1"}
    for layer, table in told["layers"].items():
        for name in ("questions", "answers", "kept"):
            part = torch.tensor(table[name])
            assert part.shape == (shape[0], len(CANDIDATES))
            assert bool(((part >= 0) & (part <= 1)).all())
        assert bool((torch.tensor(table["kept"]) > 0).all())
        assert network.layer(int(layer)).content.tolist() == table["content"]
        assert network.exported()[int(layer)].content.tolist() == table["content"]


def test_texts_without_facts_change_nothing(lookups: list[Lookup]) -> None:
    model = make_plain_model(window=2048)
    shape = (model.config.num_key_value_heads, 2, model.config.hidden_size // model.config.num_attention_heads)
    network = SearchNetwork({0: shape, 1: shape}, 6, 0, 6)
    plain = [Lookup(one.ids, one.document, ()) for one in lookups]
    assert fit_content(model, network, plain, SAMPLING, budget=128) == {}
    assert network.layer(0).content.tolist() == [HALF] * shape[0]

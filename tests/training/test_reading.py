"""Low-rank training: what is asked for stands where it is said to, what was trained reads alike when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mgam
from documents.tiny import make_plain_model, make_tokenizer, text
from mgam.errors import SettingError
from mgam.training.fit import Course, Fitting, fit
from mgam.training.lookups import LookupMaker
from mgam.training.reading import Reading, dialogue, fit_reading
from mgam.training.texts import Document, Windows

from .conftest import Killed

SETTINGS = (("window", 64), ("levels", (1, 16, 64)), ("block", 64), ("dense_until", 128), ("budget", 128))
DIALS: dict[str, Any] = {
    "lengths": (2560,), "steps": 6, "batch": 1, "questions": 2, "rank": 2, "stretch": 64, "settings": SETTINGS,
    "rate": 5e-3, "save_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    words = Document("words", torch.tensor(make_tokenizer()(text(9000))["input_ids"]))
    dials = Fitting(
        tokens=1024, steps=2, batch=1, width=6, blocks=3, voters=8, window=64, block=64, levels=(1, 16, 64)
    )  # fmt: skip
    fit(make_plain_model(window=2048), [words], folder, dials, say=lambda line: None)
    return folder


def train(prose: str, policy: Path, folder: Path, quotes: float = 0.0, **dials: Any) -> Any:
    model = make_plain_model(window=2048)
    maker = LookupMaker(make_tokenizer(), [prose], quotes=quotes)
    return fit_reading(model, policy, maker, folder, Reading(**{**DIALS, **dials}), say=lambda line: None), model


@pytest.fixture(scope="module")
def trained(prose: str, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("reading")
    return folder, train(prose, policy, folder)[1]


def test_what_is_asked_for_stands_where_it_is_said_to(prose: str) -> None:
    tokenizer = make_tokenizer()
    maker = LookupMaker(tokenizer, [prose], quotes=0.3)
    for number in range(8):
        found = maker.make(number, 2560, 3)
        assert len(found.ids) <= 2560
        again = maker.make(number, 2560, 3)
        assert torch.equal(found.ids, again.ids)
        for one in found.asked:
            answer = tokenizer.decode(found.ids[slice(*one.answer)])
            evidence = tokenizer.decode(found.ids[slice(*one.evidence)])
            assert answer.replace("<e>", "") in evidence
            assert one.evidence[1] <= found.document <= one.question[0] < one.question[1] <= one.answer[0]


def test_what_was_trained_reads_alike_when_it_is_loaded(trained: tuple[Path, Any]) -> None:
    """The folder on a fresh model, against the model that was trained, whose adapter is inside it; and off again."""
    folder, tuned = trained
    ids = torch.tensor(make_tokenizer()(text(600, seed=4))["input_ids"])[None]
    bare = folder.parent / "bare"
    bare.mkdir(exist_ok=True)
    for name in ("policy.json", "policy.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with torch.no_grad():
        plain = make_plain_model(window=2048)(ids).logits
        expected = mgam.apply(tuned, policy=str(bare), **dict(SETTINGS))(ids).logits
        fresh = make_plain_model(window=2048)
        found = mgam.apply(fresh, policy=str(folder), **dict(SETTINGS))(ids).logits
        assert torch.equal(mgam.remove(fresh)(ids).logits, plain)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    prose: str, policy: Path, trained: tuple[Path, Any], tmp_path: Path, killed_at: Killed
) -> None:
    """Stopped after the checkpoint of step 4, before the end."""
    with killed_at(5):
        train(prose, policy, tmp_path)
    train(prose, policy, tmp_path)
    for name in ("policy.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()


def test_other_dials_and_other_models_are_refused(prose: str, policy: Path, trained: tuple[Path, Any]) -> None:
    with pytest.raises(SettingError, match="holds a fit of another dials"):
        train(prose, policy, trained[0], steps=7)
    with pytest.raises(SettingError, match="holds a fit of another quotes"):
        train(prose, policy, trained[0], quotes=0.5)
    maker = LookupMaker(make_tokenizer(), [prose])
    with pytest.raises(SettingError, match="other sizes than those of the model"):
        fit_reading(make_plain_model(seed=1, window=2048).float().apply(_halved), policy, maker, trained[0] / "other")


def _halved(module: Any) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data.mul_(0.5)


def test_every_second_text_of_a_course_asks_for_something(prose: str) -> None:
    tokenizer = make_tokenizer()
    words = Document("words", torch.tensor(tokenizer(text(9000))["input_ids"]))
    windows = Windows([words], 2560, 4, 0)
    course = Course(windows, LookupMaker(tokenizer, [prose]), 2560)
    for number in range(4):
        same = torch.equal(course[number]["input_ids"], windows[number]["input_ids"])
        assert same == (number % 2 == 0)


def test_a_dialogue_is_read_as_it_is_used(prose: str) -> None:
    """The text in blocks without lookahead, questions in blocks whose queries all vote, answers one by one."""
    found = LookupMaker(make_tokenizer(), [prose]).make(1, 2560, 3)
    pieces = list(dialogue(found.document, found.asked, 64, 16).pieces(0, len(found.ids)))
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    answers = [place for one in found.asked for place in range(*one.answer)]
    assert answers == [piece.start for piece in pieces if piece.start in set(answers) and piece.stop == piece.start + 1]
    for piece in pieces:
        if piece.start < found.document:
            assert piece.vote_to <= piece.start + 1
        elif piece.stop - piece.start > 1:
            assert (piece.vote_from, piece.vote_to) == (piece.start, piece.stop)

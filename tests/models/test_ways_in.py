"""Ways in: with a context manager, with placed weights, in training, with saved settings, and with one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import mgam
from mgam import PyramidCache
from mgam.errors import SettingError
from mgam.integrations.transformers import applied_to
from mgam.schedule import Schedule

from .features import applied, close, produce
from .zoo import BY_NAME, ENOUGH, SMALL, Tiny, tokens

LLAMA, GEMMA = BY_NAME["llama"], BY_NAME["gemma3"]


def test_applied_for_the_length_of_a_block() -> None:
    model, ids = LLAMA.make(), tokens(1, 61)
    with torch.no_grad():
        expected = model(ids).logits
        with mgam.applied(model, budget=12, **SMALL) as same:
            assert same is model
            inside = model(ids).logits
        assert (inside - expected).abs().max() > 1e-2
        assert torch.equal(model(ids).logits, expected)
        with pytest.raises(RuntimeError, match="on purpose"), mgam.applied(model, budget=12, **SMALL):
            raise RuntimeError("on purpose")
        assert torch.equal(model(ids).logits, expected)
        mgam.apply(model, budget=12, **SMALL)
        with mgam.applied(model, "dense"):
            close(model(ids).logits, expected, 1e-9)
        assert torch.equal(model(ids).logits, inside)
    with pytest.raises(SettingError, match=r"call mgam\.apply"):
        applied_to(mgam.remove(model))


def test_applying_again_replaces_what_was_applied() -> None:
    model, ids = applied(LLAMA), tokens(1, 61)
    with torch.no_grad():
        mgam.apply(model, budget=ENOUGH, **SMALL)
        assert len(LLAMA.make().model.layers[0].self_attn._forward_pre_hooks) + 1 == len(
            model.model.layers[0].self_attn._forward_pre_hooks
        )
        close(model(ids).logits, LLAMA.make()(ids).logits, 1e-3)
        mgam.remove(mgam.remove(model))
        assert not model.model.layers[0].self_attn._forward_pre_hooks


def test_a_copied_model_stands_on_its_own() -> None:
    model, ids = applied(GEMMA), tokens(1, 40)
    copied = copy.deepcopy(model)
    expected = produce(model, ids)
    mgam.remove(model)
    assert torch.equal(produce(copied, ids), expected)
    assert applied_to(copied) is not None
    with torch.no_grad():
        for part in model.parameters():
            part.zero_()
    assert torch.equal(produce(copied, ids), expected)


def test_a_pipeline_of_transformers() -> None:
    """What `apply` promises: pipelines work as before."""
    from transformers import pipeline

    from documents.tiny import make_plain_model, make_tokenizer

    model, tokenizer = make_plain_model(), make_tokenizer(template=False)
    tokenizer.pad_token = "<e>"
    mgam.apply(model, budget=12, **SMALL)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["the whale and the captain of the ship " * 3, "north"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    alone = [write(text, **options)[0]["generated_text"] for text in texts]
    assert [one[0]["generated_text"] for one in write(texts, batch_size=2, **options)] == alone
    inputs = tokenizer(texts[0], return_tensors="pt")
    assert tokenizer.decode(produce(model, inputs.input_ids, 5, suppress_tokens=None)[0]) == alone[0]


def test_type_hints_name_every_setting() -> None:
    """Editors offer the dials of `apply`, and type checkers know their kinds."""
    import typing
    from dataclasses import fields

    from mgam.settings import Dials

    dials = typing.get_type_hints(Dials)
    kinds = typing.get_type_hints(mgam.Settings)
    assert dials == {
        field.name: kinds[field.name] for field in fields(mgam.Settings) if field.name not in ("method", "budget")
    }


def test_settings_are_saved_beside_a_checkpoint(tmp_path: Path) -> None:
    model, ids = applied(LLAMA, budget=16, dtype=torch.float32), tokens(1, 61)
    model.save_pretrained(tmp_path)
    applied_to(model).settings.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = mgam.apply(AutoModelForCausalLM.from_pretrained(tmp_path), mgam.Settings.from_pretrained(tmp_path))
    with torch.no_grad():
        close(again(ids).logits, model(ids).logits, 1e-5)
    assert applied_to(again).settings == applied_to(model).settings
    mgam.apply(again, applied_to(model).settings, budget=32, window=64)
    assert applied_to(again).settings == applied_to(model).settings.with_(budget=32, window=64)
    with pytest.raises(SettingError, match="method=3 must be a name"):
        mgam.apply(again, 3)


def test_settings_of_a_folder_that_came_as_a_path(tmp_path: Path) -> None:
    settings = mgam.Settings().with_(policy=tmp_path / "fitted", levels=[1, 16])
    settings.save_pretrained(tmp_path)
    assert mgam.Settings.from_pretrained(tmp_path) == settings
    assert settings.policy == str(tmp_path / "fitted")


@pytest.mark.parametrize("tiny", [LLAMA, GEMMA], ids=lambda tiny: tiny.name)
def test_weights_that_are_brought_in_layer_by_layer(tmp_path: Path, tiny: Tiny) -> None:
    """accelerate's hooks (device_map with offload): what mgam keeps follows the states, not the weights' place."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = applied(tiny, dtype=torch.float32), tokens(2, 40)
    expected, text = model(ids, use_cache=False).logits.detach(), produce(model, ids)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with torch.no_grad():
        close(model(ids, use_cache=False).logits, expected, 1e-6)
        assert torch.equal(produce(model, ids), text)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_layers_on_two_devices() -> None:
    from accelerate import dispatch_model

    model = applied(LLAMA, dtype=torch.float32)
    ids = tokens(2, 40)
    expected = produce(model, ids)
    parts = {name: 0 for name, _ in model.named_children()}
    del parts["model"]
    parts |= {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    assert torch.equal(produce(dispatch_model(model, parts), ids.to(0)).cpu(), expected)


def test_trainer_lowers_the_loss(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = applied(LLAMA, dtype=torch.float32)
    text = tokens(1, 48)[0]
    data = [{"input_ids": text, "labels": text}] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("length", [61, 40])
@pytest.mark.parametrize("positions", ["granular", "absolute"])
def test_training_after_inference_mode(positions: Any, length: int) -> None:
    """What is kept from a call under `torch.inference_mode` serves a backward pass, also of a text of like length."""
    ids, gradients = tokens(1, length), []
    for begun in (False, True):
        model = applied(LLAMA, positions, dense_until=24)
        if begun:
            with torch.inference_mode():
                model(tokens(1, 61))
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.equal(*gradients)


def test_adapters_that_were_first_read_with_under_inference_mode(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    place, path = tmp_path / "lora", "base_model.model.model.layers.1.self_attn.q_proj"
    place.mkdir()
    parts = {f"{path}.lora_A.weight": torch.rand(2, 32), f"{path}.lora_B.weight": torch.rand(32, 2)}
    save_file(parts, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}', encoding="utf-8")
    model, ids = LLAMA.make(), tokens(1, 61)
    with torch.inference_mode():
        mgam.apply(model, adapter=str(tmp_path), budget=12, **SMALL)(ids)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


def test_cumulative_lengths_of_packed_texts() -> None:
    """What transformers' flattening collator gives besides positions."""
    model, rows = applied(GEMMA), [tokens(1, length, seed=length) for length in (31, 9, 20)]
    borders = torch.tensor([0, 31, 40, 60])
    places = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    with torch.no_grad():
        out = model(
            torch.cat(rows, 1), position_ids=places, use_cache=False, cu_seq_lens_q=borders, cu_seq_lens_k=borders
        ).logits
        for part, row in zip(out.split([31, 9, 20], 1), rows, strict=True):
            close(part, model(row).logits, 1e-6)


def test_a_cache_of_transformers_is_taken_up() -> None:
    from transformers import DynamicCache

    ids = tokens(2, 40)
    for tiny in (LLAMA, GEMMA):
        model = applied(tiny)
        with torch.no_grad():
            for cache in (DynamicCache(), DynamicCache(config=model.config)):
                if tiny is GEMMA and not cache.layers:
                    continue  # transformers' own masks need to know the layers of a hybrid model
                one = model(ids, past_key_values=cache).logits
                close(one, model(ids, past_key_values=PyramidCache(model)).logits, 1e-9)


def test_long_prompts_are_read_in_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GenerationConfig

    from mgam.integrations.transformers import prefill

    model, ids = applied(GEMMA, lookahead="block"), tokens(2, 120)
    whole = produce(model, ids)
    monkeypatch.setattr(prefill, "LONG_PROMPT", 50)
    monkeypatch.setattr(prefill, "call_size", lambda model, rows: 24)
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(produce(model, ids), whole)
    assert seen[:5] == [24, 24, 24, 24, 24]
    seen.clear()
    monkeypatch.setattr(prefill, "LONG_PROMPT", 4096)
    configured = GenerationConfig(max_new_tokens=6, do_sample=False, suppress_tokens=[0], prefill_chunk_size=40)
    assert torch.equal(model.generate(ids, generation_config=configured)[:, 120:], whole)
    hook.remove()
    assert seen[:3] == [40, 40, 40]


def test_prompts_by_either_name() -> None:
    """`generate` takes a prompt as `inputs` or as `input_ids`, and the other may be None."""
    model, ids = applied(LLAMA, lookahead="block"), tokens(1, 90)
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids, **options).past_key_values
    for args, named in (((None,), {}), ((), {"inputs": None}), ((), {})):
        cache = model.generate(*args, input_ids=ids, **named, **options).past_key_values
        assert cache.pyramids[0].schedules == expected.pyramids[0].schedules
    cache = model.generate(inputs=ids, **options).past_key_values
    assert cache.pyramids[0].schedules == expected.pyramids[0].schedules


def test_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mgam.reader(...)(files, question)` loads, applies, reads and answers."""
    from mgam.documents import asking
    from mgam.integrations import loading

    model = LLAMA.make(torch.float32)
    monkeypatch.setattr(loading, "load", lambda name, **options: loading.Loaded(model, "tokenizer"))
    asked: list[object] = []

    def ask_each(*args: Any, **options: Any) -> list[str]:
        asked.append((args, options))
        return [f"answer to {question}" for question in args[3]]

    monkeypatch.setattr(asking, "ask_each", ask_each)
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"This is {name}.", encoding="utf-8")
    read = mgam.reader("some/model", budget=16, **SMALL)
    assert read(tmp_path / "one.txt", "What is it?") == "answer to What is it?"
    both = read([tmp_path / "one.txt", str(tmp_path / "two.txt")], ["What?", "Why?"], max_new_tokens=3)
    assert both == ["answer to What?", "answer to Why?"]
    (_, _, first, question), _ = asked[0]  # type: ignore[misc]
    assert ([source.text for source in first], question) == (["This is one.txt."], ["What is it?"])
    (_, _, both, _), options = asked[1]  # type: ignore[misc]
    assert [source.text for source in both] == ["This is one.txt.", "This is two.txt."]
    assert options["max_new_tokens"] == 3
    assert applied_to(model).settings.budget == 16


def test_beams_share_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reordering copies what was generated, not the prompt, and gives what copying everything gives."""
    from mgam.pyramid import Pyramid

    select, shared = Pyramid.select, []

    def watched(self: Pyramid, rows: torch.Tensor, common: int = 0) -> None:
        shared.append(common)
        select(self, rows, common)

    monkeypatch.setattr(Pyramid, "select", watched)
    ids = tokens(2, 50)
    for options in ({}, {"prefill_chunk_size": 16}):
        found = produce(applied(LLAMA), ids, 12, num_beams=3, **options)
        assert {50, 32 if options else 50} & set(shared)
        monkeypatch.setattr(Pyramid, "select", lambda self, rows, common=0: select(self, rows))
        assert torch.equal(produce(applied(LLAMA), ids, 12, num_beams=3, **options), found)
        monkeypatch.setattr(Pyramid, "select", watched)
        shared.clear()


def test_texts_with_one_schedule_are_not_beams() -> None:
    """A cache that was made with one schedule for several texts reorders all of them."""
    model, ids, token = applied(GEMMA), tokens(2, 50), tokens(2, 1, seed=5)
    with torch.no_grad():
        cache = PyramidCache(model, [Schedule.reading(45, 5, block=8, question_block=5)])
        model(ids, past_key_values=cache)
        kept = copy.deepcopy(cache)
        expected = model(token, past_key_values=kept).logits.flip(0)
        for order in ([0, 1], [1, 0]):
            cache.reorder_cache(torch.tensor(order))
        close(model(token.flip(0), past_key_values=cache).logits, expected, 1e-9)

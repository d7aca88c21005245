"""What every model of the table must be able to do. Tests run these checks, and so does the script that makes the docs.

A check raises where a model fails, returns None where it passes, and returns a reason where the feature does not apply.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import mgam
from mgam import PyramidCache
from mgam.record import Record
from mgam.schedule import Schedule

from .zoo import ENOUGH, SMALL, VOCABULARY, Tiny, tokens

Check = Callable[[Tiny], str | None]
POSITIONS = ("absolute", "granular")
LENGTHS = (61, 17, 5, 40)
GRANULAR = 1e-3
"""Angles are taken in float32 at other places of the same distance."""


def applied(tiny: Tiny, positions: str = "granular", budget: int = 12, **changes: Any) -> Any:
    """A tiny model that reads coarsely."""
    settings = {name: changes.pop(name) for name in list(changes) if name in mgam.Settings.__dataclass_fields__}
    return mgam.apply(tiny.make(**changes), budget=budget, positions=positions, **{**SMALL, **settings})


def close(one: Tensor, other: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def cut(model: Any, ids: Tensor, borders: list[int]) -> Tensor:
    """Logits of a text read in calls that end at these places."""
    cache = PyramidCache(model)
    spans = pairwise([0, *borders, ids.shape[1]])
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in spans], 1)


def texts() -> list[Tensor]:
    return [tokens(1, length, seed=length)[0] for length in LENGTHS]


def batch(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows padded with token 0, and their mask."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def _dense(tiny: Tiny, positions: str, read: Callable[[Any, Tensor], Tensor]) -> None:
    ids = tokens(2, 61)
    with torch.no_grad():
        expected = tiny.make()(ids).logits
        model = applied(tiny, positions, ENOUGH)
        close(read(model, ids), expected, GRANULAR if positions == "granular" else tiny.rough)


def one_pass(tiny: Tiny) -> None:
    """Equal to dense attention when the budget covers the text, in one pass with and without cache."""
    for positions in POSITIONS:
        _dense(tiny, positions, lambda model, ids: model(ids).logits)
        _dense(tiny, positions, lambda model, ids: model(ids, use_cache=False).logits)


def calls(tiny: Tiny) -> None:
    """The same in calls of any length."""
    for positions in POSITIONS:
        _dense(tiny, positions, lambda model, ids: cut(model, ids, [7, 40, 41]))


def stepwise(tiny: Tiny) -> None:
    """The same token by token."""
    for positions in POSITIONS:
        _dense(tiny, positions, lambda model, ids: cut(model, ids, list(range(1, 61))))


def coarse(tiny: Tiny) -> None:
    """With a small budget it reads other than densely, both kinds of positions alike, and `remove` undoes it.

    Covers that do not depend on keys are the same; searched ones open as many chunks.
    """
    ids, counts = tokens(2, 61), {}
    with torch.no_grad():
        model = tiny.make()
        expected = model(ids).logits
        for method in ("mgam", "dyadic"):
            for positions in POSITIONS:
                mgam.apply(model, method, budget=12, positions=positions, **SMALL)
                cache, record = PyramidCache(model), Record()
                cache.watch(record)
                out = model(ids, past_key_values=cache).logits
                assert (out - expected).abs().max() > 1e-2
                counts[method, positions] = record.entries
        mgam.remove(model)
        assert torch.equal(model(ids).logits, expected)
    assert counts["dyadic", "absolute"] == counts["dyadic", "granular"]
    assert counts["mgam", "absolute"][0] == counts["mgam", "granular"][0]


def left_padding(tiny: Tiny) -> None:
    """Rows of a batch padded on the left give what each gives alone, with and without cache."""
    _padded(tiny, "left", cached=(False, True))


def right_padding(tiny: Tiny) -> None:
    """Rows of a batch padded on the right do too, without cache (training)."""
    _padded(tiny, "right", cached=(False,))


def _padded(tiny: Tiny, side: str, cached: tuple[bool, ...]) -> None:
    ids, mask = batch(texts(), side)
    with torch.no_grad():
        for positions in POSITIONS:
            model = applied(tiny, positions)
            for use_cache in cached:
                out = model(ids, attention_mask=mask, position_ids=_places(mask), use_cache=use_cache).logits
                for row, text in enumerate(texts()):
                    close(out[row][mask[row].bool()], model(text[None]).logits[0], max(tiny.rough, 1e-6))


def _places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def packed(tiny: Tiny) -> None:
    """Texts packed in one row, by positions that begin again, do not see each other."""
    rows = texts()
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        for positions in POSITIONS:
            model = applied(tiny, positions)
            out = model(torch.cat(rows)[None], position_ids=places, use_cache=False).logits[0]
            for part, row in zip(out.split(list(LENGTHS)), rows, strict=True):
                close(part, model(row[None]).logits[0], max(tiny.rough, 1e-6))


def produce(model: Any, ids: Tensor, count: int = 6, **options: Any) -> Tensor:
    """Tokens that a model adds to (B, T) ids; never the padding token, which a trained model does not write either."""
    options = {"do_sample": False, "max_new_tokens": count, "suppress_tokens": [0], **options}
    return model.generate(ids, **options)[:, ids.shape[1] :]


def generation(tiny: Tiny) -> None:
    """Rows of very different lengths generate what each does alone; so they do when the prompt is read in calls."""
    ids, mask = batch(texts(), "left")
    for positions in POSITIONS:
        model = applied(tiny, positions, lookahead="block")
        alone = torch.cat([produce(model, text[None]) for text in texts()])
        assert torch.equal(produce(model, ids, attention_mask=mask), alone)
        for size in (8, 20):
            assert torch.equal(produce(model, ids, attention_mask=mask, prefill_chunk_size=size), alone)
        assert torch.equal(produce(model, ids), alone), "padding is inferred from the padding token"


def beams(tiny: Tiny) -> None:
    """Beam search over a padded batch gives what each row gives alone, and `num_beams=1` is greedy."""
    ids, mask = batch(texts(), "left")
    model = applied(tiny)
    alone = torch.cat([produce(model, text[None], num_beams=3) for text in texts()])
    assert torch.equal(produce(model, ids, attention_mask=mask, num_beams=3), alone)
    assert torch.equal(produce(model, ids, attention_mask=mask, num_beams=3, prefill_chunk_size=16), alone)


def several(tiny: Tiny) -> None:
    """`num_return_sequences` samples from one prompt, which is read once."""
    model, text = applied(tiny), texts()[0][None]
    found = []
    for options in ({}, {"prefill_chunk_size": 16}):
        torch.manual_seed(0)
        found.append(produce(model, text, do_sample=True, num_return_sequences=3, **options))
    assert found[0].shape == (3, 6)
    assert torch.equal(*found)


def lookup(tiny: Tiny) -> None:
    """Prompt lookup gives the tokens of greedy search."""
    model = applied(tiny)
    text = torch.cat((texts()[0], texts()[0][:30]))[None]
    assert torch.equal(produce(model, text, 16, prompt_lookup_num_tokens=4), produce(model, text, 16))


def assisted(tiny: Tiny) -> str | None:
    """Assisted decoding gives the tokens of greedy search, with an assistant that reads densely or not."""
    model, text = applied(tiny), texts()[0][None]
    greedy = produce(model, text, 12)
    assert torch.equal(produce(model, text, 12, assistant_model=applied(tiny, seed=3)), greedy)
    old = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)
    if old and any(layer is not None for layer in mgam_windows(model)):
        return "a dense assistant with sliding layers fails in older transformers by itself; one with mgam works"
    assert torch.equal(produce(model, text, 12, assistant_model=tiny.make()), greedy)
    return None


def mgam_windows(model: Any) -> list[int | None]:
    from mgam.integrations.transformers import applied_to

    return list(applied_to(model).windows.values())


def static_prompt(tiny: Tiny) -> None:
    """A prompt that was read once serves several questions, each with a copy of its cache."""
    model, (prompt, *questions) = applied(tiny), texts()[:3]
    with torch.no_grad():
        cache = PyramidCache(model)
        model(prompt[None], past_key_values=cache)
        for question in questions:
            whole = torch.cat((prompt, question))[None]
            fresh = PyramidCache(model)
            model(prompt[None], past_key_values=fresh)
            reused = produce(model, whole, past_key_values=copy.deepcopy(cache))
            assert torch.equal(reused, produce(model, whole, past_key_values=fresh))
        assert cache.get_seq_length() == len(prompt)


def cache_moves(tiny: Tiny) -> None:
    """`crop`, `reorder_cache` and repeats keep every row what it was."""
    model, rows, more = applied(tiny), tokens(2, 50), tokens(2, 9, seed=5)
    with torch.no_grad():
        cache = PyramidCache(model)
        model(rows, past_key_values=cache)
        expected = model(more, past_key_values=cache).logits
        cache.crop(-9)
        close(model(more, past_key_values=cache).logits, expected, tiny.rough)
        cache.crop(-9)
        cache.reorder_cache(torch.tensor([1, 0]))
        close(model(more.flip(0), past_key_values=cache).logits.flip(0), expected, tiny.rough)
        cache.crop(-9)
        cache.batch_repeat_interleave(2)
        out = model(more.flip(0).repeat_interleave(2, 0), past_key_values=cache).logits
        close(out[[2, 0]], expected, tiny.rough)


def bookmarks(tiny: Tiny) -> None:
    """`bookmark` and `go_back` return to a place in a text, even into a query block, as if nothing had followed."""
    with torch.no_grad():
        for lookahead in ("none", "block"):
            model, rows = applied(tiny), tokens(2, 90)
            schedules = [Schedule.reading(90, 0, block=8, lookahead=lookahead)] * 2  # type: ignore[arg-type]
            cache = PyramidCache(model, schedules)
            model(rows[:, :43], past_key_values=cache)
            place = cache.bookmark()
            expected = model(rows[:, 43:], past_key_values=cache).logits
            for _ in range(2):
                cache.go_back(place)
                assert cache.get_seq_length() == 43
                close(model(rows[:, 43:], past_key_values=cache).logits, expected, tiny.rough)


def bfloat16(tiny: Tiny) -> None:
    """bfloat16 stays as near to dense as bfloat16 allows."""
    _rough_type(tiny, torch.bfloat16, 0.15)


def float16(tiny: Tiny) -> None:
    """float16 stays as near to dense as float16 allows."""
    _rough_type(tiny, torch.float16, 0.05)


def _rough_type(tiny: Tiny, dtype: torch.dtype, share: float) -> None:
    """The mean distance to dense attention is a small share of the logits' spread."""
    ids = tokens(2, 61)
    with torch.no_grad():
        expected = tiny.make(dtype)(ids).logits.float()
        for positions in POSITIONS:
            model = applied(tiny, positions, ENOUGH, dtype=dtype)
            for out in (model(ids).logits, cut(model, ids, [7, 40, 41])):
                assert out.dtype == dtype
                assert (out.float() - expected).abs().mean() < share * expected.std()


def eight_bits(tiny: Tiny) -> str | None:
    """Weights of 8 bits by bitsandbytes (and torchao, where it is installed): near to dense with the same weights."""
    return _packed_weights(tiny, 8)


def four_bits(tiny: Tiny) -> str | None:
    """The same with weights of 4 bits."""
    return _packed_weights(tiny, 4)


def _packed_weights(tiny: Tiny, bits: int) -> str | None:
    ways = quantisers(bits)
    if not ways:
        return "neither bitsandbytes nor torchao is installed here"
    ids = tokens(2, 61)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wider = {"head_dim": 32} if "head_dim" in tiny.config else {}  # packed by 32 rows
        tiny.make(torch.float32, hidden_size=64, intermediate_size=128, **wider).save_pretrained(folder)
        for way in ways:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, quantization_config=way, attn_implementation=tiny.dense
            )
            expected = model(ids).logits
            mgam.apply(model, budget=ENOUGH, **SMALL)
            for out in (model(ids).logits, cut(model, ids, [40, 41])):
                assert (out - expected).abs().mean() < 0.1 * expected.std()
            mgam.apply(model, budget=12, **SMALL)
            assert (model(ids).logits - expected).abs().max() > 1e-2
            assert produce(model, ids, 3).shape == (2, 3)
    return None


def quantisers(bits: int) -> list[Any]:
    """How weights are packed here, by every library that is installed."""
    found: list[Any] = []
    if importlib.util.find_spec("bitsandbytes") is not None:
        how = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
        found.append(transformers.BitsAndBytesConfig(**how))
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import IntxWeightOnlyConfig

        found.append(transformers.TorchAoConfig(IntxWeightOnlyConfig(getattr(torch, f"int{bits}"))))
    return found


def device_map(tiny: Tiny) -> str | None:
    """A checkpoint loaded with `device_map="auto"` (accelerate) generates what it does without."""
    if importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed here"
    ids, found = tokens(2, 40), []
    with tempfile.TemporaryDirectory() as folder:
        tiny.make(torch.float32).save_pretrained(folder)
        for where in (None, "auto"):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=where)
            found.append(produce(mgam.apply(model, budget=12, **SMALL), ids))
    assert torch.equal(*found)
    return None


def checkpointing(tiny: Tiny) -> None:
    """Gradient checkpointing keeps its selections: gradients are the same to the last bit or nearly."""
    ids, grads = tokens(2, 45), []
    model = applied(tiny).train()
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        close(grads[1][name], grad, 1e-12 if tiny.finest == torch.float64 else 1e-5)


def lora(tiny: Tiny) -> str | None:
    """LoRA works on a model that mgam was applied to, and mgam on one with LoRA."""
    if importlib.util.find_spec("peft") is None:
        return "peft is not installed here"
    from peft import LoraConfig, get_peft_model

    ids, outs = tokens(2, 45), []
    for first in (True, False):
        model = tiny.make()
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        if first:
            mgam.apply(model, budget=12, **SMALL)
        model = get_peft_model(model, config)
        if not first:
            mgam.apply(model, budget=12, **SMALL)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert any(bool(part.grad.any()) for part in model.parameters() if part.grad is not None)
        outs.append((loss.detach(), produce(model.eval(), ids)))
        mgam.remove(model)
    close(outs[0][0], outs[1][0], 1e-6)
    assert torch.equal(outs[0][1], outs[1][1])
    return None


def compiled(tiny: Tiny) -> None:
    """torch.compile leaves the attention out of its graphs and gives the same; `fullgraph=True` is refused in words."""
    ids, model = tokens(1, 40), applied(tiny)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        close(torch.compile(model, backend="eager")(ids, use_cache=False).logits, expected, max(tiny.rough, 1e-6))
        torch._dynamo.reset()
        try:
            torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False)
            said = "nothing"
        except Exception as error:  # torch's own kind differs by version
            said = str(error)
        # In older transformers the rotation of Phi-3 is no single graph by itself.
        assert "compile without fullgraph=True" in said or "longrope_frequency_update" in said


def checkpoint_files(tiny: Tiny) -> None:
    """`save_pretrained` after `apply` writes an ordinary checkpoint."""
    model = applied(tiny, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert "mgam" not in json.dumps(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=tiny.dense)
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        ids = torch.arange(2, 40)[None] % VOCABULARY
        close(again(ids).logits, mgam.remove(model)(ids).logits, 1e-5)


FEATURES: dict[str, Check] = {
    "one pass": one_pass,
    "cut calls": calls,
    "token by token": stepwise,
    "coarse, both positions": coarse,
    "left padding": left_padding,
    "right padding": right_padding,
    "packed": packed,
    "generate, rows apart": generation,
    "beams": beams,
    "several samples": several,
    "prompt lookup": lookup,
    "assisted": assisted,
    "prompt reused": static_prompt,
    "crop, reorder, repeat": cache_moves,
    "bookmark, go back": bookmarks,
    "bfloat16": bfloat16,
    "float16": float16,
    "8-bit weights": eight_bits,
    "4-bit weights": four_bits,
    "device map": device_map,
    "gradient checkpointing": checkpointing,
    "LoRA": lora,
    "torch.compile": compiled,
    "saved checkpoint": checkpoint_files,
}

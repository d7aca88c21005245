"""What cannot be served is refused with the reason; nothing is read densely in silence or changes its neighbour."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

import mgam
from mgam import PyramidCache
from mgam.errors import SettingError, UnsupportedModelError
from mgam.integrations.transformers.models import NATIVE, TABLE
from mgam.schedule import Schedule

from .features import applied, batch, texts
from .zoo import BY_NAME, COMMON, SMALL, ZOO, tokens

LLAMA, GEMMA = BY_NAME["llama"], BY_NAME["gemma2"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def refused(reason: str, run: Callable[[], object]) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        run()


def test_every_row_of_the_table_is_tested() -> None:
    assert {tiny.model_type for tiny in ZOO} == set(TABLE)


# Models


def test_an_unknown_architecture_names_the_row_to_add() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=97)
    )
    refused("'gpt2' is not in the table.*add a row to TABLE.*CONTRIBUTING", lambda: mgam.apply(model))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", NATIVE)
def test_native_sparse_and_recurrent_models(model_type: str) -> None:
    from mgam.integrations.transformers.models import architecture

    config = LlamaConfig()
    config.model_type = model_type
    refused(f"'{model_type}' is .*(recurrent|linear|sparse|latent)", lambda: architecture(config))


def test_a_real_recurrent_model() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    refused("recurrent", lambda: mgam.apply(AutoModelForCausalLM.from_config(config)))


def test_layers_of_another_kind() -> None:
    model = BY_NAME["qwen3"].make()
    model.config.layer_types = ["full_attention", "linear_attention"]
    refused("layer 1 is of kind 'linear_attention'", lambda: mgam.apply(model))


def test_a_model_that_slides_everywhere() -> None:
    refused("every layer reads a sliding window of 10", lambda: mgam.apply(BY_NAME["mistral"].make(sliding_window=10)))


def test_a_model_that_reads_both_ways() -> None:
    refused("not a causal decoder", lambda: mgam.apply(BY_NAME["gemma3"].make(use_bidirectional_attention=True)))


def test_what_is_no_language_model() -> None:
    refused("a Linear was given", lambda: mgam.apply(nn.Linear(2, 2)))
    assert isinstance(mgam.remove(nn.Linear(2, 2)), nn.Linear)
    refused(
        "has an encoder",
        lambda: mgam.apply(
            __import__("transformers").T5ForConditionalGeneration(
                AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=97)
            )
        ),
    )


def test_an_attention_name_that_is_taken() -> None:
    ours = AttentionInterface._global_mapping.pop("mgam", None)
    try:
        AttentionInterface.register("mgam", nn.functional.scaled_dot_product_attention)
        refused("already knows an attention named 'mgam'", lambda: applied(LLAMA))
    finally:
        AttentionInterface._global_mapping.pop("mgam")
        if ours is not None:
            AttentionInterface.register("mgam", ours)


def test_the_name_without_apply() -> None:
    applied(LLAMA)
    config = AutoConfig.for_model("llama", **COMMON)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="mgam")
    refused("mgam was not applied to it", lambda: model(tokens(1, 5)))


def test_attention_dropout() -> None:
    model = applied(LLAMA, attention_dropout=0.1).train()
    refused("attention dropout 0.1", lambda: model(tokens(1, 5), use_cache=False))


# Masks


def test_masks() -> None:
    model, ids = applied(LLAMA), tokens(2, 20)
    mask = torch.ones_like(ids)
    hole = mask.clone()
    hole[0, 7:9] = 0
    for use_cache in (False, True):
        refused("holes", lambda: model(ids, attention_mask=hole, use_cache=use_cache))  # noqa: B023
        refused("a mask of", lambda: model(ids, attention_mask=mask[:, None, None].bool(), use_cache=use_cache))  # noqa: B023
    right = mask.clone()
    right[1, -4:] = 0
    refused("padded on the right", lambda: model(ids, attention_mask=right, use_cache=True))
    refused("padded on the right", lambda: model.generate(ids, attention_mask=right, max_new_tokens=3))
    model(ids, attention_mask=right, use_cache=False)
    refused("rows of 20", lambda: model(ids, attention_mask=mask[:, :15] * 0, use_cache=False))


@pytest.mark.parametrize("size", [None, 16])
def test_masks_of_prompts_that_are_read_in_calls(size: int | None) -> None:
    """However a prompt is read, its mask is looked at as a whole, also where the last calls show no hole."""
    model, ids = applied(LLAMA), tokens(2, 90)
    options = {"max_new_tokens": 3, "prefill_chunk_size": size}
    for holes in (slice(20, 30), slice(40, 41)):
        mask = torch.ones_like(ids)
        mask[1, holes] = 0
        refused("holes", lambda: model.generate(ids, attention_mask=mask, **options))  # noqa: B023
    right = torch.ones_like(ids)
    right[1, 60:] = 0
    refused("padded on the right", lambda: model.generate(ids, attention_mask=right, **options))
    square = torch.ones(2, 1, 90, 90)
    refused("a mask of", lambda: model.generate(ids, attention_mask=square, **options))


def test_a_mask_that_changes_its_mind() -> None:
    """Past tokens that a later mask no longer shows would be read all the same: refused."""
    model, ids = applied(LLAMA), tokens(2, 20)
    cache = PyramidCache(model)
    model(ids, past_key_values=cache)
    mask = torch.ones(2, 24)
    mask[0, :6] = 0
    refused("marks 14 past tokens of row 0", lambda: model(ids[:, :4], attention_mask=mask, past_key_values=cache))


def test_a_padded_row_does_not_change_its_neighbour() -> None:
    for side in ("left", "right"):
        model = applied(GEMMA)
        ids, mask = batch(texts(), side)
        one = model(ids, attention_mask=mask, use_cache=False).logits
        ids[1] = torch.where(mask[1] > 0, ids[1], 42)  # other padding
        ids[2] = (ids[2] + 3) % 90 + 2  # another text
        other = model(ids, attention_mask=mask, use_cache=False).logits
        for row in (0, 3):
            assert torch.equal(one[row][mask[row] > 0], other[row][mask[row] > 0])
        torch.testing.assert_close(one[1][mask[1] > 0], other[1][mask[1] > 0], atol=1e-12, rtol=0)


def test_a_row_of_padding_only() -> None:
    model, (ids, mask) = applied(GEMMA), batch(texts(), "left")
    mask[2] = 0
    out = model(ids, attention_mask=mask, use_cache=False).logits
    assert not out.isnan().any()
    torch.testing.assert_close(out[0], model(ids[:1], use_cache=False).logits[0], atol=1e-6, rtol=0)


# Positions


def test_positions_given_by_the_caller() -> None:
    """Any positions are right where keys are rotated by them; ranks refuse those that leave some out."""
    ids, jump = tokens(1, 30), torch.arange(30)[None]
    jump = jump + 5 * (jump >= 10)
    whole = torch.ones_like(ids)
    dense = LLAMA.make()(ids, position_ids=jump, attention_mask=whole).logits
    absolute = applied(LLAMA, "absolute", 4096)
    torch.testing.assert_close(absolute(ids, position_ids=jump, attention_mask=whole).logits, dense, atol=1e-9, rtol=0)
    granular = applied(LLAMA, "granular", 4096)
    refused("must go on by one", lambda: granular(ids, position_ids=jump, past_key_values=PyramidCache(granular)))
    cache = PyramidCache(granular)
    granular(ids, past_key_values=cache)
    refused(
        "goes on at position 99 after 29",
        lambda: granular(ids[:, :1], position_ids=torch.tensor([[99]]), past_key_values=cache),
    )
    shifted = granular(ids, position_ids=torch.arange(30)[None] + 7).logits
    torch.testing.assert_close(shifted, granular(ids).logits, atol=1e-9, rtol=0)


def test_positions_with_a_mask() -> None:
    granular, (ids, mask) = applied(LLAMA), batch(texts(), "left")
    wrong = torch.arange(ids.shape[1]).expand_as(ids).clone()
    granular(ids, attention_mask=mask, position_ids=wrong, use_cache=False)
    wrong[0, 30:] += 2
    mask[0, 0] = 0  # so that transformers hands the mask on
    refused("must go on by one", lambda: granular(ids, attention_mask=mask, position_ids=wrong, use_cache=False))


# Caches


def test_caches_of_other_kinds() -> None:
    model, ids = applied(LLAMA), tokens(1, 12)
    filled = DynamicCache()
    LLAMA.make()(ids, past_key_values=filled)
    refused("already holds states", lambda: model(ids, past_key_values=filled))
    refused(
        "cache_implementation='static'", lambda: model.generate(ids, max_new_tokens=2, cache_implementation="static")
    )
    refused("cannot hold pyramids", lambda: model.generate(ids, max_new_tokens=2, cache_implementation="offloaded"))
    from transformers import StaticCache

    refused("StaticLayer", lambda: model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32)))


def test_caches_of_other_models_and_settings() -> None:
    ids = tokens(1, 12)

    def filled(positions: str = "granular", tiny: Any = LLAMA, **changes: Any) -> PyramidCache:
        model = applied(tiny, positions, **changes)
        cache = PyramidCache(model)
        model(ids, past_key_values=cache)
        return cache

    model = applied(LLAMA)
    refused("made for levels", lambda: model(ids, past_key_values=filled(levels=(1, 2, 16))))
    refused("made for absolute positions", lambda: model(ids, past_key_values=filled("absolute")))
    refused("heads of", lambda: model(ids, past_key_values=filled(head_dim=12)))
    refused("heads of", lambda: model(ids, past_key_values=filled(num_key_value_heads=4)))
    refused("layers, the model more", lambda: model(ids, past_key_values=filled(num_hidden_layers=1)))
    refused("a window of 12", lambda: applied(GEMMA)(ids, past_key_values=filled(tiny=GEMMA, sliding_window=12)))


@pytest.mark.parametrize(
    ("one", "other"), [("mgam", "snapkv"), ("streaming-llm", "mgam"), ("h2o", "dense"), ("mgam", "longheads")]
)
def test_caches_of_other_methods(one: str, other: str) -> None:
    """Where one of two methods forgets tokens or learns on the way, neither goes on from the other's cache."""
    model, ids = LLAMA.make(), tokens(1, 40)
    settings = {**SMALL, "budget": 160 if "snapkv" in (one, other) else 12, "positions": "absolute"}
    if "streaming-llm" in (one, other) or "longheads" in (one, other):
        settings["positions"] = "granular"
    cache = PyramidCache(mgam.apply(model, one, **settings))
    model(ids, past_key_values=cache)
    mgam.apply(model, other, **settings)
    refused(f"made for method '{one}', the model reads with '{other}'", lambda: model(ids, past_key_values=cache))


def test_methods_that_keep_every_token_share_their_caches() -> None:
    model, ids = LLAMA.make(), tokens(1, 40)
    cache = PyramidCache(mgam.apply(model, "dense", **SMALL))
    one = model(ids, past_key_values=cache).logits
    mgam.apply(model, budget=4096, positions="absolute", **SMALL)
    other = model(ids, past_key_values=cache).logits
    expected = mgam.remove(model)(torch.cat((ids, ids), 1)).logits
    torch.testing.assert_close(torch.cat((one, other), 1), expected, atol=1e-3, rtol=0)


def test_a_cache_on_another_device() -> None:
    model, ids = applied(LLAMA), tokens(1, 12)
    cache = PyramidCache(model)
    model(ids, past_key_values=cache)
    refused("begin with a new cache after moving", lambda: model.to("meta")(ids.to("meta"), past_key_values=cache))


@pytest.mark.parametrize("lookahead", ["none", "block"])
def test_a_crop_into_a_query_block(lookahead: Any) -> None:
    """A block that began before the crop is decided by the voters that it had; where they are gone, it is refused."""
    model, ids = applied(LLAMA), tokens(1, 90)

    def read(*borders: int) -> PyramidCache:
        cache = PyramidCache(model, [Schedule.reading(80, 10, block=8, question_block=8, lookahead=lookahead)])
        for first, last in pairwise((0, *borders)):
            model(ids[:, first:last], past_key_values=cache)
        return cache

    for stop in (90, 88, 86, 75) if lookahead == "none" else ():  # else the cut alone changes who decides
        cropped = read(90)
        cropped.crop(stop - 1 - 90)
        out = model(ids[:, stop - 1 :], past_key_values=cropped).logits
        expected = model(ids[:, stop - 1 :], past_key_values=read(stop - 1)).logits
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    far = read(90)
    far.crop(-37)  # 53 is 6 blocks of 8, and 5 tokens
    refused("cropped into a query block", lambda: model(ids[:, 53:], past_key_values=far))
    border = read(90)
    border.crop(-34)
    if lookahead == "block":
        expected = model(ids[:, 56:], past_key_values=read(56)).logits
        torch.testing.assert_close(model(ids[:, 56:], past_key_values=border).logits, expected, atol=1e-12, rtol=0)


def test_a_bookmark_and_rows_that_changed() -> None:
    model, ids = applied(GEMMA), tokens(2, 12)
    cache = PyramidCache(model)
    model(ids, past_key_values=cache)
    place = cache.bookmark()
    cache.batch_repeat_interleave(2)
    refused("rows were repeated", lambda: cache.go_back(place))


def test_a_cast_model_begins_anew() -> None:
    model, ids = applied(LLAMA), tokens(1, 12)
    cache = PyramidCache(model)
    model(ids, past_key_values=cache)
    refused("begin with a new cache", lambda: model.float()(ids, past_key_values=cache))


def test_a_pyramid_given_to_a_dense_model() -> None:
    """It would read the new tokens only, without a word."""
    model, ids = applied(LLAMA), tokens(1, 12)
    cache = PyramidCache(model)
    model(ids, past_key_values=cache)
    refused("call mgam.apply", lambda: LLAMA.make()(ids, past_key_values=cache))
    mgam.remove(model)
    refused("call mgam.apply", lambda: model(ids, past_key_values=cache))


def test_rows_that_do_not_match() -> None:
    model, ids = applied(LLAMA), tokens(2, 12)
    cache = PyramidCache(model)
    model(ids, past_key_values=cache)
    refused("holds 2 rows was given 1", lambda: model(ids[:1], past_key_values=cache))


def test_a_sliding_layer_forgets_only_what_it_kept() -> None:
    model, ids = applied(GEMMA), tokens(1, 300)
    cache = PyramidCache(model)
    model(ids, past_key_values=cache)
    kept = copy.deepcopy(cache)
    cache.crop(-256)
    refused("cannot forget 270", lambda: kept.crop(-270))


def test_reset() -> None:
    model, ids = applied(GEMMA), tokens(1, 30)
    cache = PyramidCache(model)
    one = model(ids, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, one)


# Settings


def test_settings_that_cannot_work() -> None:
    with pytest.raises(SettingError, match="budget=1 "):
        mgam.apply(LLAMA.make(), budget=1, **SMALL)
    with pytest.raises(SettingError, match="unknown setting budgt"):
        mgam.apply(LLAMA.make(), budgt=12)
    with pytest.raises(SettingError, match="unknown method"):
        mgam.apply(LLAMA.make(), "mgm")
    with pytest.raises(SettingError, match="backend='cuda' is unknown; choose one of triton, torch, reference"):
        mgam.apply(LLAMA.make(), backend="cuda")
    with pytest.raises(SettingError, match="choose at most 512"):
        mgam.apply(LLAMA.make(), **{**SMALL, "dense_until": 513})
    with pytest.raises(SettingError, match="choose a smaller window"):
        mgam.apply(LLAMA.make(), **{**SMALL, "window": 500})
    with pytest.raises(SettingError, match="prefill_chunk_size"):
        applied(LLAMA).generate(tokens(1, 20), max_new_tokens=1, prefill_chunk_size=-3)


WRONG: dict[str, tuple[Any, ...]] = {
    "a whole number$": ("1", 1.0, True, None, [1]),
    "a whole number or None$": ("1", 32.5, False, [1]),
    "a number$": ("x", True, None, [0.5]),
    "a number or None$": ("x", True, [0.5]),
    "text$": (1, None, ["mgam"]),
    "text or None$": (1, True, ["mgam"]),
    "whole numbers such as": (5, "1, 64", None, (1, 16.0), ["1", "64"], {"1": 64}),
    "'summaries' or 'drop'$": (1, None, ["drop"], "dropp"),
    "'absolute' or 'granular'$": (1, None, ["granular"], "rank"),
    "'none' or 'block'$": (0, None, ["block"], "blocks"),
    "8 or 16$": (8.0, "16", None, True, 4),
}
KINDS = {
    "method": "text$",
    **dict.fromkeys(
        ("budget", "window", "search", "every", "block", "question_block", "middle", "reread"), "a whole number$"
    ),
    **dict.fromkeys(("question_budget", "search_dims", "dense_until"), "a whole number or None$"),
    **dict.fromkeys(("backend", "policy", "adapter"), "text or None$"),
    **dict.fromkeys(("recall", "content"), "a number or None$"),
    "mass": "a number$",
    "levels": "whole numbers such as",
    "search_bits": "8 or 16$",
    "rest": "'summaries' or 'drop'$",
    "positions": "'absolute' or 'granular'$",
    "lookahead": "'none' or 'block'$",
}


@pytest.mark.parametrize("name", mgam.Settings.__dataclass_fields__)
def test_settings_of_another_kind(name: str) -> None:
    for value in WRONG[KINDS[name]]:
        with pytest.raises(SettingError, match=rf"^{name}=.* must be {KINDS[name]}"):
            mgam.Settings(**{name: value})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", r"holds list \[1\], where settings by their names are wanted"),
        ("null", "holds NoneType None"),
        ('{"levels": 5}', "levels=5 must be whole numbers"),
        ('{"mass": "x"}', "mass='x' must be a number"),
        ('{"budgt": 12}', "unknown setting budgt"),
        ("{", "cannot be read as settings"),
    ],
)
def test_saved_settings_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mgam.json").write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=said):
        mgam.Settings.from_pretrained(tmp_path)


def test_a_refused_model_is_left_as_it_was() -> None:
    model = LLAMA.make()
    expected = model(tokens(1, 20)).logits
    with pytest.raises(SettingError):
        mgam.apply(model, **{**SMALL, "window": 500})
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens(1, 20)).logits, expected)


@pytest.mark.parametrize(
    "settings", [{"adapter": "no-such-adapter"}, {"dense_until": 513}, {"window": 500}, {"policy": "no-such-policy"}]
)
def test_a_refusal_keeps_what_was_applied_before(settings: dict[str, Any]) -> None:
    model, ids = LLAMA.make(), tokens(1, 61)
    plain = model(ids).logits
    for before in (plain, None):
        if before is None:
            before = mgam.apply(model, budget=12, **SMALL)(ids).logits
        with pytest.raises(SettingError):
            mgam.apply(model, **{**SMALL, **settings})
        assert torch.equal(model(ids).logits, before)
    mgam.remove(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, plain)


def test_a_failure_halfway_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from mgam.integrations.transformers import low_rank

    def broken(additions: object) -> list[Any]:
        raise RuntimeError("on purpose")

    model, ids = LLAMA.make(), tokens(1, 61)
    plain = model(ids).logits
    monkeypatch.setattr(low_rank, "attach", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        mgam.apply(model, budget=12, **SMALL)
    assert model.config._attn_implementation == "sdpa"
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    assert torch.equal(model(ids).logits, plain)


def test_weights_over_tokens_are_not_to_be_had() -> None:
    refused("output_attentions", lambda: applied(LLAMA)(tokens(1, 9), output_attentions=True))


def test_longrope_growing_past_its_switch_with_rotated_keys() -> None:
    """Kept keys of one rotation do not go with queries of another; ranks have no such switch."""
    phi, ids = BY_NAME["phi3"], tokens(1, 530)
    for positions in ("absolute", "granular"):
        model = applied(phi, positions)
        cache = PyramidCache(model)
        model(ids[:, :500], past_key_values=cache)
        if positions == "absolute":
            refused("rotates otherwise", lambda: model(ids[:, 500:], past_key_values=cache))  # noqa: B023
        else:
            assert not model(ids[:, 500:], past_key_values=cache).logits.isnan().any()
            out = model.generate(ids[:, :510], max_new_tokens=8, do_sample=False)
            again = model.generate(ids[:, :510], max_new_tokens=8, do_sample=False, prefill_chunk_size=64)
            assert torch.equal(out, again)

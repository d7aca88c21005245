"""Time and memory of every method over one text: reading it, and one token after it."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mgam import methods, nn
from mgam.errors import SettingError
from mgam.methods import Method

WIDTH, HEADS, KV_HEADS = 512, 8, 2
CALL, GPU_CALL = 2048, 32768
"""Tokens a decoder reads in one call: on a GPU short ones would tell the time in which the host plans them."""
GENERATED = 15
LONGEST = 131072
"""Tokens of the longest text whose covers fit the model's positions, whatever the method."""
REPEATS = 3
LONG = 20.0
"""Seconds of a first call from which on it is not repeated."""
MODULES: dict[str, dict[str, Any]] = {"cca": {"window": 1024}, "dga": {"block": 256}}
"""Settings of modules that differ from their defaults, so that they suit long texts."""


def time_method(name: str, tokens: int, device: str, *, trained: bool | None = None) -> dict[str, Any]:
    """Seconds and bytes of one method over one text of random tokens, in one layer of 8 query and 2 KV heads.

    Args:
        name: a name from `mgam methods`.
        tokens: length of the text.
        device: torch's name of a device. On a CPU seconds are those of its cores, and peak bytes those of the process.
        trained: whether to time the trainable module of a method that is a policy too; None: only if it is no policy.

    Returns:
        `form`, `seconds` (one per repeat), `peak_bytes`; `token_seconds` of a token after the text and `kept_bytes` of
        the cache, for decoders and for modules that stream as they read.

    Raises:
        SettingError: unknown method, or no text.
    """
    if tokens < 64:
        raise SettingError(f"{tokens} tokens are too few to be timed; give 64 or more")
    method = methods.get(name)
    if method.form == "module" or (trained and method.module):
        return _of_a_module(method, tokens, device)
    model = _decoder(device)
    if method.form == "loop":
        return {"form": "loop", **_of_a_loop(model, tokens, device)}
    from mgam.integrations.transformers import apply

    if name != "dense":
        apply(model, name, dense_until=0)
    return {"form": "decoder", **_of_a_decoder(model, tokens, device)}


class Letters:
    """A tokenizer of single letters."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}


def _decoder(device: str) -> Any:
    """One layer, of which attention is all but the whole cost."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=LONGEST // 4, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model: Any = LlamaForCausalLM(config)
    return model.to(device, dtype).eval()


@torch.no_grad()
def _of_a_decoder(model: Any, tokens: int, device: str) -> dict[str, Any]:
    """Seconds of reading a text in calls and of a token after it (median); bytes at most, and kept."""
    ids = torch.randint(2, 64, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(device)
    from transformers import DynamicCache

    from mgam.integrations.transformers import PyramidCache
    from mgam.schedule import Schedule

    kept: list[Any] = []
    applied = getattr(model, "_mgam_applied", None)

    def read() -> None:
        if applied is None:
            kept.append(DynamicCache(config=model.config))
        else:
            block, asked = applied.settings.block, applied.settings.question_block
            schedule = Schedule.reading(tokens - 32, 32, block=block, question_block=asked, lookahead="none")
            kept.append(PyramidCache(model, [schedule]))
        decoder, call = model.get_decoder(), GPU_CALL if device.startswith("cuda") else CALL
        for first in range(0, tokens, call):
            decoder(input_ids=ids[:, first : first + call], past_key_values=kept[0], use_cache=True)

    found = _timed(read, device, kept.clear)
    each = [_step(model, ids[:, place : place + 1], kept[0], device) for place in range(2 + GENERATED)]
    found["token_seconds"] = round(median(each[2:]), 6)  # the first token of an evicting method forgets
    found["kept_bytes"] = _bytes_of(kept[0])
    return found


def _bytes_of(cache: Any) -> int:
    """Bytes of all tensors that a cache holds, each storage once."""
    seen: dict[int, int] = {}
    waiting, known = [cache], set()
    while waiting:
        one = waiting.pop()
        if id(one) in known:
            continue
        known.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif type(one).__module__.startswith(("mgam", "transformers.cache")) and hasattr(one, "__dict__"):
            waiting += vars(one).values()
    return sum(seen.values())


def _step(model: Any, token: torch.Tensor, cache: Any, device: str) -> float:
    """Seconds of one token."""
    _wait(device)
    begun = _clock(device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    _wait(device)
    return _clock(device) - begun


def _of_a_loop(model: Any, tokens: int, device: str) -> dict[str, Any]:
    """Seconds of reading a text of so many letters for a question."""
    from mgam.documents.infiniretri import retrieve
    from mgam.methods.infiniretri import Retrieval

    text = ("The number of the box is seven. " * (tokens // 32 + 1))[:tokens]
    dials = Retrieval(window=512, budget=512)
    return _timed(lambda: retrieve(model, Letters(), text, "Which box?", dials), device)


def _of_a_module(method: Method, tokens: int, device: str) -> dict[str, Any]:
    """Seconds and bytes of one pass over whole states, and of a token after them (median) where the module streams."""
    kind = getattr(nn, method.module)
    causal = kind.CAUSAL
    own = dict(MODULES.get(method.name, {})) | ({"longest": tokens} if method.name == "linformer" else {})
    torch.manual_seed(0)
    heads = {} if method.name == "reformer" else {"kv_heads": KV_HEADS}
    module = kind(WIDTH, HEADS, causal=causal, **heads, **own).to(device)
    states = torch.randn(1, tokens, WIDTH, device=device)
    with torch.no_grad():
        found = {"form": "module", "causal": causal, **_timed(lambda: module(states), device)}
        if causal and not kind.LEAK:
            found |= _of_a_state(module, states, device)
    return found


def _of_a_state(module: nn.SelfAttention, states: torch.Tensor, device: str) -> dict[str, Any]:
    """Seconds of a token after a text, and bytes kept of it."""
    state, each = module.step(states)[1], []
    for place in range(2 + GENERATED):
        token = states[:, place : place + 1]
        _wait(device)
        begun = _clock(device)
        state = module.step(token, state)[1]
        _wait(device)
        each.append(_clock(device) - begun)
    return {"token_seconds": round(median(each[2:]), 6), "kept_bytes": _bytes_of(state)}


def _timed(call: Callable[[], Any], device: str, before: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Seconds of some calls after a first one, which compiles kernels, and the most bytes above those held before."""
    seconds: list[float] = []
    peak = None
    compiles = device.startswith("cuda")
    for number in range(REPEATS + compiles):
        before()
        gc.collect()
        _wait(device)
        held = _held(device)
        begun = _clock(device)
        call()
        _wait(device)
        took = _clock(device) - begun
        if held is not None:
            peak = max(peak or 0, _highest(device) - held)
        if number >= compiles or took > LONG:
            seconds.append(round(took, 6))
        if sum(seconds) > LONG / 4:
            break
    return {"seconds": seconds, "peak_bytes": peak}


def _clock(device: str) -> float:
    """Seconds; on a CPU those of this process's threads, so that other work on the machine does not count."""
    return time.perf_counter() if device.startswith("cuda") else time.process_time()


def _held(device: str) -> int | None:
    """Bytes held now, from which the highest mark begins anew; None where the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that it counts when used again
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return _resident("VmRSS")


def _highest(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()

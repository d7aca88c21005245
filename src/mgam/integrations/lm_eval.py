"""lm-evaluation-harness: `mgam` as a model type, for any of its tasks.

    python -m mgam.integrations.lm_eval --model mgam --model_args pretrained=MODEL,method=mgam,budget=1024 --tasks TASK

Releases of the harness that know entry points find the model type by themselves (`lm-eval --model mgam`); 0.4.13 does
not, and this module, run or imported first, registers it there.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mgam.errors import MgamError, SettingError
from mgam.integrations.loading import load
from mgam.integrations.transformers.apply import apply
from mgam.integrations.transformers.cache import PyramidCache
from mgam.integrations.transformers.call_size import call_size
from mgam.schedule import Schedule
from mgam.settings import Settings

try:
    from lm_eval.api.registry import register_model  # type: ignore[import-not-found, unused-ignore]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, unused-ignore]
except ImportError as error:
    raise MgamError("lm-evaluation-harness is not installed; pip install 'mgam[eval]'") from error

LOGITS_CALL = 512
"""Tokens read in one call where their logits are wanted."""
LONGEST = 1 << 20
"""Tokens that a prompt may have when granular positions lift the limit of the trained window."""
EMBEDDED = "default"
"""Name of the model that is used when none is given."""
HARNESS_ARGUMENTS = (
    "add_bos_token", "prefix_token_id", "truncation", "think_end_token", "enable_thinking", "chat_template_args",
    "softmax_dtype", "mixed_precision_dtype", "logits_cache",
)  # fmt: skip


@register_model("mgam")
class MgamLM(HFLM):
    """A transformers model that mgam was applied to.

    Args:
        pretrained: hub id, folder or GGUF file; `default` is the embedded model.
        method: a name from `mgam methods`, or `dense`.
        budget, and all other fields of `mgam.Settings`: as in `mgam.apply`; levels as `1/64/1024`.
        max_length: longest prompt in tokens; longer ones lose their beginning. By default what the model was trained
            for when it reads densely or at absolute positions, else a million.
    """

    def __init__(
        self,
        pretrained: str = EMBEDDED,
        method: str = "mgam",
        budget: int = 1024,
        *,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        **others: Any,
    ) -> None:
        settings = {name: _setting(name, value) for name, value in others.items() if name in _known_settings()}
        passed = {name: value for name, value in others.items() if name in HARNESS_ARGUMENTS}
        unknown = sorted(set(others) - set(settings) - set(passed))
        if unknown:
            known = sorted({*_known_settings(), *HARNESS_ARGUMENTS})
            raise SettingError(f"unknown model argument {', '.join(unknown)}; known are {', '.join(known)}")
        loaded = load(
            None if pretrained == EMBEDDED else pretrained, device=device or "auto", dtype=dtype, download=True
        )
        model: Any = loaded.model
        if method != "dense":
            apply(model, method, budget=int(budget), **settings)
            if max_length is None and model._mgam_applied.settings.positions == "granular":
                max_length = LONGEST
        super().__init__(
            pretrained=model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            **passed,
        )
        self._wanted: int | None = None

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        single = (override_bs or self.batch_size) == 1
        self._wanted = max((len(one[2]) for one in requests), default=1) if single else None
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        finally:
            self._wanted = None

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (1, wanted, vocabulary) of the last positions; earlier ones are read in calls without logits.

        The harness counts positions from the end when there are fewer logits than tokens.
        """
        if self._wanted is None or inps.shape[0] != 1:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        cache, length = self._cache(inps.shape[1]), inps.shape[1]
        silent = max(0, length - self._wanted)
        decoder = self.model.get_decoder()
        size = call_size(self.model)
        for first in range(0, silent, size):
            decoder(input_ids=inps[:, first : min(first + size, silent)], past_key_values=cache, use_cache=True)
        parts = []
        for first in range(silent, length, LOGITS_CALL):
            part = inps[:, first : min(first + LOGITS_CALL, length)]
            parts.append(self.model(input_ids=part, past_key_values=cache, use_cache=True).logits)
        return torch.cat(parts, 1)

    def _cache(self, tokens: int) -> Any:
        applied = getattr(self.model, "_mgam_applied", None)
        if applied is None:
            return DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return PyramidCache(self.model, [Schedule.uniform(applied.settings.block, "none")], reserve=tokens)


def _known_settings() -> set[str]:
    return {one.name for one in fields(Settings)} - {"method", "budget"}


def _setting(name: str, value: Any) -> Any:
    """Values as the harness hands them on from a command line."""
    if isinstance(value, str) and "/" in value and all(part.isdigit() for part in value.split("/")):
        return tuple(int(part) for part in value.split("/"))
    return None if name in ("dense_until", "backend") and value in ("none", "None") else value


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found, unused-ignore]

    cli_evaluate()

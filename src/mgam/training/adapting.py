"""Low-rank training with full attention: a model learns to look things up inside the window that it was trained for.

What is asked for then stands out in its queries and keys, and these are what searches go by: so it is found through
covers of texts far longer than the window too. No policy is needed, and none is fitted.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from mgam.errors import SettingError
from mgam.integrations.transformers.low_rank import CONFIG, FOLDER, WEIGHTS, adapters, fingerprint
from mgam.integrations.transformers.models import architecture
from mgam.processes import world
from mgam.training.checkpoints import last_whole
from mgam.training.fit import Clock, Log, Say
from mgam.training.lookups import Lookup, LookupMaker
from mgam.training.runs import CHECKPOINTS, LOG, NotANumberError, open_run, saying_why

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear layers that get adapters."""


@dataclass(frozen=True)
class Adapting:
    """The dials of low-rank training."""

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    """Tokens of the texts of a step: any of these."""
    steps: int = 400
    minutes: float = 0.0
    """Ends sooner after so long; 0: no limit."""
    batch: int = 4
    """Texts of a step, over all devices, where they are long; of shorter ones as many more as make the same tokens."""
    at_once: int = 1
    """Of these, how many are read together: that takes less time and more memory."""
    questions: int = 16
    rate: float = 6e-4
    rank: int = 32
    prose: float = 0.3
    """Weight of the loss on text, beside that on answers."""
    stretch: int = 1024
    """Tokens of each text whose loss counts."""
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2048 or min(self.steps, self.batch, self.rank, self.at_once) < 1:
            raise SettingError("lengths start at 2048 tokens; steps, batch, rank and texts at once at 1")
        if self.batch % self.at_once:
            raise SettingError(
                f"{self.at_once} texts at once do not divide the {self.batch} of a step; change --lora-at-once or "
                "--lora-batch"
            )

    def many(self, tokens: int) -> int:
        """Texts of so many tokens in place of one of the longest."""
        return max(self.lengths) // tokens


class Lookups(Dataset[list[Lookup]]):
    """Lookups in place of text number n of a run."""

    def __init__(self, maker: LookupMaker, dials: Adapting) -> None:
        self.maker, self.dials = maker, dials

    def __len__(self) -> int:
        return self.dials.steps * self.dials.batch

    def __getitem__(self, number: int) -> list[Lookup]:
        rng = random.Random(f"length/{self.dials.seed}/{number // self.dials.batch}")
        tokens = rng.choice(self.dials.lengths)
        many = self.dials.many(tokens)
        return [self.maker.make(number * many + one, tokens, self.dials.questions) for one in range(many)]


class Pupil(nn.Module):
    """A model with adapters that reads with its own attention: what is trained, and nothing else, is its state."""

    def __init__(self, model: Any, dials: Adapting) -> None:
        super().__init__()
        self.model, self.dials = model, dials

    def trained(self) -> dict[str, Tensor]:
        """Names and tensors of all that changes."""
        return {name: one.data for name, one in self.named_parameters() if one.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what is trained: a checkpoint does not hold the model."""
        return self.trained()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Takes what `state_dict` gave."""
        there = self.trained()
        for name, value in state_dict.items():
            there[name].copy_(value.to(there[name].device))
        return nn.modules.module._IncompatibleKeys([], [])

    def forward(self, lookups: Sequence[Lookup]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of lookups that are read together. What is appended to shorter ones comes after all that counts."""
        ids = pad_sequence([one.ids for one in lookups], batch_first=True).to(self.model.device)
        return self._losses(self._hidden(ids), ids, lookups)

    def _hidden(self, ids: Tensor) -> Tensor:
        """Hidden states (B, T, width) of ids (B, T)."""
        decoder = self.model.get_base_model().get_decoder()
        hidden: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def _losses(self, hidden: Tensor, ids: Tensor, lookups: Sequence[Lookup]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of answers, and of a stretch of each text of prose, drawn by what it says."""
        answers, texts = [], []
        for lookup in lookups:
            first = lookup.drawn % max(1, lookup.document - self.dials.stretch - 1)
            last = min(first + 1 + self.dials.stretch, lookup.document) if lookup.prose else first + 1
            answers.append(torch.cat([torch.arange(*one.answer) for one in lookup.asked]))
            texts.append(torch.arange(first + 1, last))
        told, read = self._loss(hidden, ids, answers), self._loss(hidden, ids, texts)
        return told + self.dials.prose * read, {"answers": told.detach(), "text": read.detach()}

    def _loss(self, hidden: Tensor, ids: Tensor, targets: list[Tensor]) -> Tensor:
        """Mean over texts of the mean loss of the tokens at `targets`, (N,) of each text, ."""
        head = self.model.get_base_model().get_output_embeddings()
        row = torch.cat([torch.full_like(one, number) for number, one in enumerate(targets)]).to(ids.device)
        weight = torch.cat([torch.full((len(one),), 1 / max(1, len(one))) for one in targets]).to(ids.device)
        at = torch.cat(targets).to(ids.device)
        each = nn.functional.cross_entropy(head(hidden[row, at - 1]).float(), ids[row, at], reduction="none")
        return (each * weight).sum() / max(1, sum(len(one) > 0 for one in targets))


class _Trainer(Trainer):
    """Trains a pupil."""

    parts: dict[str, float]

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **rest: Any
    ) -> Any:
        """The pupil's own loss."""
        loss, parts = model(inputs["lookups"])
        if not bool(torch.isfinite(loss)):
            raise NotANumberError(f"the loss is not a number any more at step {self.state.global_step + 1}: {parts}")
        self.parts = {name: float(value) for name, value in parts.items()}
        return (loss, None) if return_outputs else loss

    def _get_train_sampler(self, *args: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # drawn by number, not by order

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss."""
        super().log({**logs, **(self.parts if "loss" in logs else {})}, *args, **kwargs)


def with_adapters(model: Any, rank: int) -> Any:
    """The model with fresh adapters of PEFT in its attention."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(pupil: Pupil, maker: LookupMaker, place: Path, device: torch.device, say: Say) -> Trainer:
    """Trains a pupil in a folder, from its last whole checkpoint on; returns the trainer, which knows how it went.

    Raises:
        FittingError: the loss is no number any more, or the folder cannot be written.
    """
    dials = pupil.dials
    workers = 0 if dials.steps < 20 else min(4, os.cpu_count() or 1)
    arguments = TrainingArguments(
        output_dir=str(place / CHECKPOINTS), max_steps=dials.steps, per_device_train_batch_size=dials.at_once,
        gradient_accumulation_steps=max(1, dials.batch // (dials.at_once * world())), learning_rate=dials.rate,
        lr_scheduler_type="constant", max_grad_norm=1.0, seed=dials.seed, logging_steps=10,
        save_steps=dials.save_every, save_total_limit=2, report_to=[], remove_unused_columns=False,
        disable_tqdm=True, use_cpu=device.type == "cpu", dataloader_num_workers=workers,
        dataloader_pin_memory=False, average_tokens_across_devices=False, logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer = _Trainer(
        model=pupil, args=arguments, train_dataset=Lookups(maker, dials),
        data_collator=lambda items: {"lookups": [one for item in items for one in item]},
        callbacks=[Log(place / LOG, say), Clock(dials.minutes)],
    )  # fmt: skip
    kept = last_whole(place / CHECKPOINTS)
    trainer.remove_callback(PrinterCallback)
    with saying_why(place, dials.rate):
        trainer.train(resume_from_checkpoint=None if kept is None else str(kept))
    return trainer


def fit_adapter(
    model: Any,
    maker: LookupMaker,
    folder: str | Path,
    dials: Adapting | None = None,
    *,
    start: str | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Trains adapters with which a model looks things up, inside its window and with its own attention.

    Args:
        model: a transformers decoder, on its device; LoRA layers of PEFT are put into it.
        folder: where the adapters (`lora/`) go; `mgam.apply(model, adapter=folder)` reads with them.
        start: adapters to go on from, of the same rank, instead of fresh ones.

    Returns: how many steps, how many seconds.

    Raises:
        SettingError: texts longer than the window; a run of other dials is there; adapters of another rank or model.
        FittingError: the loss is no number any more.
    """
    dials = dials or Adapting()
    window = architecture(model.config).trained_window(model.config)
    if max(dials.lengths) > window:
        raise SettingError(
            f"the model was trained for {window} tokens, and learns with full attention inside them; texts of "
            f"{max(dials.lengths)} were asked for with --lengths"
        )
    place = Path(folder)
    began_at = {} if start is None else {"start": fingerprint(start)}
    open_run(place, {"dials": asdict(dials), **maker.described, **began_at}, True, model.device)
    torch.manual_seed(dials.seed)
    tuned = with_adapters(model, dials.rank)
    if start is not None:
        adopt(tuned, start, dials.rank)
    began = time.perf_counter()
    trainer = train(Pupil(tuned, dials), maker, place, model.device, say)
    found = {"steps": trainer.state.global_step, "seconds": round(time.perf_counter() - began, 1)}
    if trainer.is_world_process_zero():
        with saying_why(place, dials.rate):
            save_adapter(tuned, place / FOLDER)
    return found


def adopt(tuned: Any, start: str, rank: int) -> None:
    """Gives fresh adapters the weights of others.

    Raises:
        SettingError: the others are of another rank or another model.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    there = load_file(adapters(start) / FOLDER / WEIGHTS)
    ranks = {one.shape[0] for name, one in there.items() if name.endswith("lora_A.weight")}
    if ranks != {rank}:
        raise SettingError(f"the adapters {start} are of rank {max(ranks, default=0)}; give --lora-rank so")
    try:
        found: Any = set_peft_model_state_dict(tuned, there)
    except RuntimeError as error:
        raise SettingError(f"the adapters {start} are of another model: {error}") from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:
        raise SettingError(f"the adapters {start} are of another model: {(missing + found.unexpected_keys)[0]}")


def save_adapter(tuned: Any, folder: Path) -> None:
    """Writes the adapter as PEFT does, in half precision and without the machine's paths."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    save_file(
        {name: one.detach().cpu().half().contiguous() for name, one in state.items()},
        folder / WEIGHTS,
    )
    config = tuned.peft_config["default"]
    body = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.r, "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules), "bias": "none", "lora_dropout": 0.0, "use_dora": False,
        "use_rslora": False, "base_model_name_or_path": "", "inference_mode": True,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

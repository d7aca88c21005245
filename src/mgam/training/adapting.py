"""Low-rank training with full attention: a model learns to look things up inside the window that it was trained for.

What is asked for then stands out in its queries and keys, and these are what searches go by: so it is found through
covers of texts far longer than the window too. No policy is needed, and none is fitted.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from mgam.errors import SettingError
from mgam.integrations.transformers.low_rank import CONFIG, FOLDER, WEIGHTS
from mgam.integrations.transformers.models import architecture
from mgam.processes import world
from mgam.training.checkpoints import last_whole
from mgam.training.fit import Clock, Log, Say
from mgam.training.lookups import Asked, Lookup, LookupMaker
from mgam.training.runs import CHECKPOINTS, LOG, NotANumberError, open_run, saying_why

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear layers that get adapters."""


@dataclass(frozen=True)
class Adapting:
    """The dials of low-rank training."""

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    """Tokens of a text: any of these."""
    steps: int = 400
    minutes: float = 0.0
    """Ends sooner after so long; 0: no limit."""
    batch: int = 4
    """Texts of a step, over all devices."""
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
        if not self.lengths or min(self.lengths) < 2048 or self.steps < 1 or self.batch < 1 or self.rank < 1:
            raise SettingError("lengths start at 2048 tokens; steps, batch and rank at 1")


class Lookups(Dataset[Lookup]):
    """Lookup number n of a run."""

    def __init__(self, maker: LookupMaker, dials: Adapting) -> None:
        self.maker, self.dials = maker, dials

    def __len__(self) -> int:
        return self.dials.steps * self.dials.batch

    def __getitem__(self, number: int) -> Lookup:
        rng = random.Random(f"length/{self.dials.seed}/{number}")
        return self.maker.make(number, rng.choice(self.dials.lengths), self.dials.questions)


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

    def forward(
        self, ids: Tensor, document: int, asked: tuple[Asked, ...], place: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one lookup: ids (T,); `place` draws the stretch of the text whose loss counts."""
        return self._losses(self._hidden(ids), ids, document, asked, place)

    def _hidden(self, ids: Tensor) -> Tensor:
        decoder = self.model.get_base_model().get_decoder()
        hidden: Tensor = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        return hidden

    def _losses(
        self, hidden: Tensor, ids: Tensor, document: int, asked: tuple[Asked, ...], place: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of answers and of a stretch of text, from hidden states (T, width)."""
        answers = torch.cat([torch.arange(*one.answer) for one in asked]).to(ids.device)
        first = place % max(1, document - self.dials.stretch - 1)
        text = torch.arange(first + 1, min(first + 1 + self.dials.stretch, document), device=ids.device)
        told, read = self._loss(hidden, ids, answers), self._loss(hidden, ids, text)
        return told + self.dials.prose * read, {"answers": told.detach(), "text": read.detach()}

    def _loss(self, hidden: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of the tokens at `targets`."""
        head = self.model.get_base_model().get_output_embeddings()
        return nn.functional.cross_entropy(head(hidden[targets - 1]).float(), ids[targets])


class _Trainer(Trainer):
    """Trains a pupil, one lookup at a time on each device."""

    parts: dict[str, float]

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **rest: Any
    ) -> Any:
        """The pupil's own loss."""
        lookup: Lookup = inputs["lookup"]
        ids = lookup.ids.to(self.args.device)
        loss, parts = model(ids, lookup.document, lookup.asked, int(lookup.ids.sum()) * 7919)
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
        output_dir=str(place / CHECKPOINTS), max_steps=dials.steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, dials.batch // world()), learning_rate=dials.rate,
        lr_scheduler_type="constant", max_grad_norm=1.0, seed=dials.seed, logging_steps=10,
        save_steps=dials.save_every, save_total_limit=2, report_to=[], remove_unused_columns=False,
        disable_tqdm=True, use_cpu=device.type == "cpu", dataloader_num_workers=workers,
        dataloader_pin_memory=False, average_tokens_across_devices=False, logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer = _Trainer(
        model=pupil, args=arguments, train_dataset=Lookups(maker, dials),
        data_collator=lambda items: {"lookup": items[0]}, callbacks=[Log(place / LOG, say), Clock(dials.minutes)],
    )  # fmt: skip
    kept = last_whole(place / CHECKPOINTS)
    trainer.remove_callback(PrinterCallback)
    with saying_why(place, dials.rate):
        trainer.train(resume_from_checkpoint=None if kept is None else str(kept))
    return trainer


def fit_adapter(
    model: Any, maker: LookupMaker, folder: str | Path, dials: Adapting | None = None, *, say: Say = print
) -> dict[str, Any]:
    """Trains adapters with which a model looks things up, inside its window and with its own attention.

    Args:
        model: a transformers decoder, on its device; LoRA layers of PEFT are put into it.
        folder: where the adapters (`lora/`) go; `mgam.apply(model, adapter=folder)` reads with them.

    Returns: how many steps, how many seconds.

    Raises:
        SettingError: texts longer than the window; a run of other dials is there.
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
    open_run(place, {"dials": asdict(dials), "texts": maker.seed, "quotes": maker.quotes}, True, model.device)
    torch.manual_seed(dials.seed)
    tuned = with_adapters(model, dials.rank)
    began = time.perf_counter()
    trainer = train(Pupil(tuned, dials), maker, place, model.device, say)
    found = {"steps": trainer.state.global_step, "seconds": round(time.perf_counter() - began, 1)}
    if trainer.is_world_process_zero():
        with saying_why(place, dials.rate):
            save_adapter(tuned, place / FOLDER)
    return found


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

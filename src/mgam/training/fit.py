"""`fit`: a learned policy for a frozen model, distilled from its own full attention."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mgam.errors import SettingError
from mgam.integrations.transformers.fitted import shape_of
from mgam.integrations.transformers.models import architecture
from mgam.levels import Levels
from mgam.policies.files import FittedPolicy
from mgam.processes import crew, from_first, world
from mgam.training.checkpoints import last_whole
from mgam.training.content import QUESTIONS, TEXTS, fit_content
from mgam.training.importance import measure_importance
from mgam.training.lessons import Sampling, lessons_of
from mgam.training.lookups import LookupMaker
from mgam.training.marks import TEXTS as MARKED
from mgam.training.marks import measure_marks
from mgam.training.network import Lesson, SearchNetwork
from mgam.training.runs import CHECKPOINTS, LOG, FittingError, NotANumberError, open_run, saying_why
from mgam.training.teacher import Seen, watching
from mgam.training.texts import Document, Windows, fingerprint

__all__ = ["CHECKPOINTS", "LOG", "Clock", "Fitting", "FittingError", "Log", "Say", "fit"]

Say = Callable[[str], None]
CONTENT = "content.json"
"""What each head finds and keeps, by the part of the budget for what is found whatever the distance."""
IMPORTANCE = "importance.json"
"""How far the next tokens change when a head reads little, and what it loses then."""
WEIGHED = 2
"""Texts on which heads are weighed on a GPU."""


@dataclass(frozen=True)
class Fitting:
    """The dials of a fit."""

    tokens: int = 8192
    """Tokens of a text, at most the trained window: the teacher is sound within it."""
    steps: int = 400
    batch: int = 4
    """Texts of a step, over all devices."""
    minutes: float = 0.0
    """Ends sooner after so long, with the rate falling to nothing by then; 0: no limit. A fit with a limit does not
    give the same weights again."""
    rate: float = 2e-3
    width: int = 32
    """Search dimensions, the pull of what is near among them."""
    slots: int = 0
    """Search queries of a position and KV head; 0: one for each query head of a group."""
    lookup_tokens: int = 0
    """Tokens of the texts with questions that every second text is, at most those of a text; 0: there are none. Prose
    alone hardly ever asks for one place far back."""
    importance: int | None = None
    """Texts on which it is measured how much each head matters, which takes a reading of a text for each KV head; 0:
    all heads are taken to matter alike. None: 2 on a GPU, 0 without."""
    blocks: int = 12
    voters: int = 16
    window: int = 512
    block: int = 128
    levels: tuple[int, ...] = (1, 64, 1024)
    search: int = 4
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "batch", "blocks", "voters", "save_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be 1 or more")
        if not 0 <= self.lookup_tokens <= self.tokens:
            raise SettingError(f"lookup_tokens={self.lookup_tokens} must lie between 0 and tokens={self.tokens}")
        if self.importance is not None and self.importance < 0:
            raise SettingError(f"importance={self.importance} must be 0 (not measured) or a number of texts")
        if self.width < 2 or self.slots < 0 or not self.rate > 0:
            raise SettingError(
                f"width={self.width} must be 2 or more, slots={self.slots} 0 or more, and rate={self.rate} above 0"
            )

    @property
    def reach(self) -> int:
        """Distances, each twice the last, up to a whole text's, at which the prior of distance is learned."""
        return 1 + int(math.log2(max(1, self.tokens // self.levels[1])))

    @property
    def sampling(self) -> Sampling:
        """How lessons are drawn."""
        return Sampling(
            Levels(self.levels, self.search), self.window, self.block, self.blocks, self.voters,
            last=min(4, self.blocks) if self.lookup_tokens else 1,
        )  # fmt: skip


class Course(Dataset[dict[str, Tensor]]):
    """Windows of text, and every second a lookup."""

    def __init__(self, windows: Windows, lookups: LookupMaker | None, tokens: int) -> None:
        self.windows, self.lookups, self.tokens = windows, lookups, tokens

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if self.lookups is None or number % 2 == 0:
            return self.windows[number]
        found = self.lookups.make(number, self.tokens, max(6, self.tokens // 256))
        return {**self.windows[number], "input_ids": found.ids}


class _Trainer(Trainer):
    """Trains the searches; the frozen teacher stands beside."""

    def __init__(self, teacher: Any, sampling: Sampling, numbers: list[int], **rest: Any) -> None:
        super().__init__(**rest)
        self.teacher, self.sampling, self.numbers = teacher, sampling, numbers
        self.parts: dict[str, float] = {}

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, list[Tensor]], return_outputs: bool = False, **rest: Any
    ) -> Any:
        """One pass of the teacher, lessons of all layers, and their loss."""
        lessons = self._lessons(inputs["input_ids"], [int(number) for number in inputs["number"]])
        loss, parts = model(lessons)
        if not bool(torch.isfinite(loss)):
            by_layer = zip(lessons, parts["layers"].tolist(), strict=True)
            bad = [number for number, value in by_layer if not math.isfinite(value)]
            raise NotANumberError(
                f"the loss is not a number any more at step {self.state.global_step + 1}, in layers {bad}"
            )
        self.parts = {name: float(value) for name, value in parts.items() if name != "layers"}
        return (loss, None) if return_outputs else loss

    def _lessons(self, texts: list[Tensor], numbers: list[int]) -> dict[int, list[Lesson]]:
        """Lessons by layer; texts of one length are read together."""
        found: dict[int, list[Lesson]] = {}
        for length in sorted({len(ids) for ids in texts}):
            alike = [place for place, ids in enumerate(texts) if len(ids) == length]
            ids = torch.stack([texts[place] for place in alike])
            more = lessons_of(self.teacher, ids, [numbers[place] for place in alike], self.sampling)
            for layer, lessons in more.items():
                found.setdefault(layer, []).extend(lessons)
        return found

    def _get_train_sampler(self, *args: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # drawn by number, not by order

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss."""
        super().log({**logs, **(self.parts if "loss" in logs else {})}, *args, **kwargs)


class Log(TrainerCallback):
    """Writes what Trainer logs as JSON lines, and says how far it is."""

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.say, self.begin, self.first, self.told = path, say, time.perf_counter(), 0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Starts the clock."""
        self.begin, self.first = time.perf_counter(), state.global_step

    def on_substep_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Says after the first text how long all will take, where there is no GPU."""
        if self.told or not args.use_cpu or not state.is_world_process_zero:
            return
        self.told = True
        each = time.perf_counter() - self.begin
        minutes = each * args.gradient_accumulation_steps * (state.max_steps - self.first) / 60
        whole = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} hours"
        self.say(
            f"no GPU is used: a text takes {each:.1f} s here, so all {state.max_steps} steps take about {whole}; fewer "
            "--steps or shorter texts take less"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The same where a step is one text."""
        self.on_substep_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """One line."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, "seconds": round(time.perf_counter() - self.begin, 1), **logs}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "loss" in logs:
            done = max(1, state.global_step - self.first)
            left = (time.perf_counter() - self.begin) / done * (state.max_steps - state.global_step)
            self.say(f"step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}, about {left:.0f} s left")


class Clock(TrainerCallback):
    """Lets the rate fall to nothing by the last step or the last minute, whichever comes first.

    Of several processes the first one's clock counts: with rates of their own their weights would drift apart, and one
    that stops alone would leave the others waiting.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self.begin = minutes, time.perf_counter()
        self.full: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Starts the clock."""
        self.begin = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any) -> None:
        """Sets the rates."""
        done = state.global_step / max(1, state.max_steps)
        if self.minutes:
            done = max(done, from_first((time.perf_counter() - self.begin) / (60 * self.minutes), args.device))
        self.full = self.full or [group["initial_lr"] for group in optimizer.param_groups]
        rise = min(1.0, (state.global_step + 1) / 20)
        for group, full in zip(optimizer.param_groups, self.full, strict=True):
            group["lr"] = full * rise * max(0.02, min(1.0, 1.5 * (1 - done)))
        if done >= 1:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Ends in time."""
        if self.minutes and from_first(time.perf_counter() - self.begin, args.device) > 60 * self.minutes:
            control.should_training_stop = control.should_save = True


def fit(
    model: Any,
    documents: Sequence[Document],
    folder: str | Path,
    fitting: Fitting | None = None,
    *,
    resume: bool = True,
    lookups: LookupMaker | None = None,
    say: Say = print,
    notes: dict[str, Any] | None = None,
) -> FittedPolicy:
    """Fits a policy to a frozen model and writes it into `folder`.

    A run that was stopped, by whatever, goes on from its last whole checkpoint when it is called again with the same
    model, data and dials, and ends with the same weights.

    Args:
        model: a transformers decoder that mgam applies to, on its device; its weights are frozen and stay as they are.
        documents: what is fitted on.
        lookups: makes texts with questions, where `fitting.lookup_tokens` asks for some.
        resume: whether to go on with a run that is there; else it must not be there.
        say: called with short sentences about progress.
        notes: what to keep with the policy, for people.

    Raises:
        SettingError: texts too short, too few, or a run of other dials in the folder.
        UnsupportedModelError: a model that mgam does not apply to.
        FittingError: the loss is no number any more, or the disk is full; says what was kept.
    """
    fitting = fitting or Fitting()
    place = Path(folder)
    refuse_short(fitting, architecture(model.config).trained_window(model.config))
    shape = shape_of(model)
    shapes = {int(layer): sizes for layer, sizes in shape.layers.items()}
    narrowest = min(dim for _, _, dim in shapes.values())
    if fitting.width > narrowest + 1:
        raise SettingError(
            f"width={fitting.width} is more than the {narrowest} dimensions of the model's heads, and one"
        )
    if fitting.batch % world():
        raise SettingError(f"--batch {fitting.batch} does not divide over {world()} processes")
    windows = Windows(documents, fitting.tokens, fitting.steps * fitting.batch, fitting.seed)
    course = Course(windows, lookups if fitting.lookup_tokens else None, fitting.lookup_tokens)
    what = {"dials": asdict(fitting), "model": asdict(shape), "data": fingerprint(documents)}
    what |= {name: value for name, value in (notes or {}).items() if name == "adapter"}
    open_run(place, what, resume, model.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    torch.manual_seed(fitting.seed)
    network = SearchNetwork(shapes, fitting.width, fitting.slots, fitting.reach)
    network.to(model.device)
    kept = last_whole(place / CHECKPOINTS)
    if kept is None:
        begin(network, model, windows, fitting)
    else:
        say(f"going on from {kept.name}")
    trainer = _Trainer(
        model, fitting.sampling, list(network_layers(network)), model=network,
        args=_arguments(place, fitting, model), train_dataset=course, data_collator=_collate,
        callbacks=[Log(place / LOG, say)],
    )  # fmt: skip
    started = time.perf_counter()
    trainer.remove_callback(PrinterCallback)
    if fitting.minutes:
        trainer.add_callback(Clock(fitting.minutes))
    with saying_why(place, fitting.rate):
        trainer.train(resume_from_checkpoint=None if kept is None else str(kept))
    counted: dict[str, Any] = {}
    if course.lookups is not None:
        say("measuring which heads look facts up")
        texts = (
            course.lookups.make(-1 - number, fitting.tokens, QUESTIONS) for number in range(min(TEXTS, fitting.steps))
        )
        counted = fit_content(model, network, texts, fitting.sampling)
    more = Windows(documents, fitting.tokens, MARKED, fitting.seed + 1)
    weighed = fitting.importance if fitting.importance is not None else WEIGHED if model.device.type == "cuda" else 0
    others = Windows(documents, fitting.tokens, weighed, fitting.seed + 2)
    weighing = (others[number]["input_ids"] for number in range(weighed))
    matter = measure_importance(model, network, weighing, fitting.sampling, say)
    marks = measure_marks(model, network, (more[number]["input_ids"] for number in range(MARKED)), fitting.sampling)
    fitted = FittedPolicy(
        shape, fitting.width, network.slots, fitting.search, network.exported(), marks,
        notes={
            **(notes or {}), "fitting": asdict(fitting), "data": [document.name for document in documents],
            "data_fingerprint": fingerprint(documents),
            "steps": trainer.state.global_step, "seconds": round(time.perf_counter() - started, 1),
            "device": device_name(model.device),
        },
    )  # fmt: skip
    if trainer.is_world_process_zero():
        with saying_why(place, fitting.rate):
            fitted.save(place)
            for name, found in ((CONTENT, counted), (IMPORTANCE, matter)):
                if found:
                    (place / name).write_text(json.dumps(found) + "\n", encoding="utf-8")
    if (several := crew(model.device.type)) is not None:
        several.wait_for_everyone()
    return replace(fitted, folder=place)


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def network_layers(network: SearchNetwork) -> list[int]:
    """Numbers of the layers that are fitted."""
    return [int(name) for name in network.layers]


def refuse_short(fitting: Fitting, trained_window: int) -> None:
    """Refuses texts in which there is nothing to choose, or which the teacher was not trained for.

    Raises:
        SettingError: says what would do.
    """
    if fitting.tokens > trained_window:
        raise SettingError(
            f"--tokens {fitting.tokens} is beyond the {trained_window} positions that the model was trained for, where "
            f"its full attention teaches nothing sound; choose at most {trained_window}"
        )
    shortest = min(fitting.tokens, fitting.lookup_tokens or fitting.tokens)
    if shortest < fitting.sampling.shortest:
        raise SettingError(
            f"texts of {shortest} tokens are too short for levels {fitting.levels} and a window of "
            f"{fitting.window}: nothing is left to choose; at least {fitting.sampling.shortest} are wanted"
        )


@torch.no_grad()
def begin(network: SearchNetwork, model: Any, windows: Dataset[dict[str, Tensor]], fitting: Fitting) -> None:
    """Starts every layer at the principal directions of its keys in the first text."""

    def visit(seen: Seen) -> None:
        every = max(1, fitting.tokens // 2048)
        network.layer(seen.layer).begin(seen.queries[0, :, ::every], seen.keys[0, :, ::every], seen.scale)

    with watching(model, visit):
        model.get_decoder()(input_ids=windows[0]["input_ids"][None].to(model.device), use_cache=False)


def _collate(items: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [item[name] for item in items] for name in items[0]}


def _arguments(place: Path, fitting: Fitting, model: Any) -> TrainingArguments:
    each = fitting.batch // world()
    at_once = 1 if model.device.type == "cpu" else next(n for n in (4, 3, 2, 1) if each % n == 0)
    return TrainingArguments(
        output_dir=str(place / CHECKPOINTS), max_steps=fitting.steps, per_device_train_batch_size=at_once,
        gradient_accumulation_steps=each // at_once, learning_rate=fitting.rate, lr_scheduler_type="cosine",
        warmup_steps=min(20, fitting.steps // 10), weight_decay=0.0, max_grad_norm=1.0, seed=fitting.seed,
        logging_steps=10, save_steps=fitting.save_every, save_total_limit=2, save_strategy="steps", report_to=[],
        remove_unused_columns=False, disable_tqdm=True, use_cpu=model.device.type == "cpu", dataloader_num_workers=0,
        dataloader_pin_memory=False, average_tokens_across_devices=False, logging_nan_inf_filter=False,
    )  # fmt: skip

"""One run: training, checkpoints, and the figures of the test."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from mgam.evaluation.machine import conditions
from papertable.library import TASKS, Library
from papertable.measure import CUTS, evaluate, read_otherwise, ready
from papertable.models import Reader, kernels, loss_of, parameters
from papertable.sample import Batch, collate
from papertable.shelf import Part
from papertable.sizes import Size


@dataclass(frozen=True)
class Run:
    """A training: what makes its result, and its name."""

    name: str
    model: str
    rate: float
    seed: int
    size: Size
    tasks: tuple[str, ...] = TASKS
    changes: dict[str, Any] = field(default_factory=dict)
    tuning: bool = False
    steps: int = 0
    """0: as many as the size says."""
    mixed: bool = False
    """Lengths after the first stage come in a drawn order, as often as otherwise: the run does not end with one."""

    @property
    def total(self) -> int:
        """Steps."""
        return self.steps or max(1, round(self.size.steps * (self.size.tuning_share if self.tuning else 1)))

    def length(self, step: int) -> int:
        """Tokens of a document at a step."""
        stages, done = self.size.tuning if self.tuning else self.size.stages, 0.0
        begin = round(stages[0][1] * self.total)
        if self.mixed and step >= begin:
            step = begin + int(np.random.default_rng(self.seed).permutation(self.total - begin)[step - begin])
        for length, share in stages:
            done += share
            if step < round(done * self.total):
                return length
        return stages[-1][0]

    def rate_at(self, step: int) -> float:
        """Warm-up over a twentieth, then a cosine to a tenth."""
        warm = max(1, self.total // 20)
        if step < warm:
            return self.rate * (step + 1) / warm
        place = (step - warm) / max(1, self.total - warm)
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * place)))

    def known(self) -> dict[str, Any]:
        """Plain values."""
        names = ("name", "model", "rate", "seed", "tasks", "changes", "tuning", "mixed")
        return {**{name: getattr(self, name) for name in names}, "steps": self.total}


class Steps(Dataset[Batch]):
    """The batch of each step: a pure function of run and step."""

    def __init__(self, run: Run, library: Library, first: int) -> None:
        self.run, self.library, self.first = run, library, first

    def __len__(self) -> int:
        return self.run.total - self.first

    def __getitem__(self, index: int) -> Batch:
        step, run = self.first + index, self.run
        length = run.length(step)
        rows = max(len(run.tasks), run.size.tokens // length)
        part: Part = "train"
        samples = [
            self.library.sample(run.tasks[(step + row) % len(run.tasks)], part, length, run.seed, step * rows + row)
            for row in range(rows)
        ]
        return collate(samples)


def batches(run: Run, library: Library, first: int, workers: int) -> Iterator[Batch]:
    """Batches from a step on, made by other processes where there are some."""
    yield from ready(Steps(run, library, first), workers, torch.cuda.is_available() and workers > 0)


@dataclass
class Progress:
    """What a run has measured so far; kept with its checkpoint."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Means over `check_every` steps."""
    seconds: float = 0.0
    """Of training; other runs may share the device, so it tells how long to wait and nothing else."""
    diverged: int | None = None


def train(
    run: Run, library: Library, folder: Path, device: str, workers: int = 0, until: float = math.inf
) -> dict[str, Any] | None:
    """Trains from where the run was left, tests, and writes `runs/NAME.json`. None: time was up, it can go on.

    A loss that is not finite ends the training; the run is kept as diverged, and counts as 0.
    """
    result = folder / "runs" / f"{run.name}.json"
    if result.is_file():
        return json.loads(result.read_text())
    torch.manual_seed(run.seed)
    model = Reader(run.model, run.size, **run.changes).to(device)
    optimizer = torch.optim.AdamW(
        model.groups(), run.rate, (0.9, 0.95), weight_decay=0.01, fused=device.startswith("cuda")
    )
    kept = folder / "checkpoints" / run.name
    progress = _load(kept, model, optimizer)
    with kernels(run.model, device):
        if not _steps(run, library, model, optimizer, progress, kept, device, workers, until):
            return None
    found: dict[str, Any] = {"run": run.known(), "parameters": parameters(model), **asdict(progress)}
    if progress.diverged is None:
        began = time.perf_counter()
        part: Part = "dev" if run.tuning else "test"
        cells = run.size.dev if run.tuning else run.size.test
        with kernels(run.model, device):
            found["test"] = evaluate(model, library, run.tasks, part, cells, run.size.tokens, device, workers)
        found["test_seconds"] = round(time.perf_counter() - began, 1)
    found |= {"library": library.name, "conditions": conditions(device)}
    _write(result, found)
    if run.model.startswith("mgam") and not run.tuning and not run.changes and progress.diverged is None:
        for name, how in CUTS.items():
            with kernels(run.model, device), read_otherwise(model, **how):
                cut = evaluate(model, library, run.tasks, part, run.size.cut, run.size.tokens, device, workers)
            found.setdefault("read otherwise", {})[name] = {key: cut[key] for key in ("scores", "samples")}
            _write(result, found)
    shutil.rmtree(kept, ignore_errors=True)
    return found


def _write(result: Path, found: dict[str, Any]) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    partial = result.with_suffix(".part")
    partial.write_text(json.dumps(found))
    partial.rename(result)


def _steps(
    run: Run,
    library: Library,
    model: Reader,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    kept: Path,
    device: str,
    workers: int,
    until: float,
) -> bool:
    """Trains to the end; False: time was up."""
    model.train()
    size, began, saved = run.size, time.perf_counter(), time.monotonic()
    before = progress.seconds
    losses: list[torch.Tensor] = []
    for batch in batches(run, library, progress.step, workers):
        losses.append(_one(run, model, optimizer, batch.to(device), progress.step, device))
        progress.step += 1
        last = progress.step == run.total
        if len(losses) == size.check_every or last:
            mean = float(torch.stack(losses).mean())
            losses = []
            progress.losses.append(round(mean, 6))
            progress.seconds = before + time.perf_counter() - began
            if not math.isfinite(mean):
                progress.diverged = progress.step
                break
            late = time.time() > until
            if not last and (late or time.monotonic() - saved > size.keep_seconds):
                _save(kept, model, optimizer, progress)
                saved = time.monotonic()
                if late:
                    return False
    return True


def _one(
    run: Run, model: Reader, optimizer: torch.optim.Optimizer, batch: Batch, step: int, device: str
) -> torch.Tensor:
    for group in optimizer.param_groups:
        group["lr"] = run.rate_at(step) * group.get("times", 1.0)
    with torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext():
        units, tokens = model(batch)
        loss = loss_of(units, tokens, batch)
    optimizer.zero_grad(set_to_none=True)
    (loss if model.lesson is None else loss + model.taught * model.lesson).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    return loss.detach()


def _save(kept: Path, model: Reader, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": part.contiguous() for name, part in model.state_dict().items()}
    for name, part in model.named_parameters():
        for key, value in optimizer.state[part].items():
            state[f"{key}.{name}"] = value.detach().contiguous()
    save_file(state, kept / "state.part")
    (kept / "progress.part").write_text(json.dumps(asdict(progress)))
    (kept / "state.part").rename(kept / f"state-{progress.step}.safetensors")
    (kept / "progress.part").rename(kept / "progress.json")  # from here on the new state counts
    for old in kept.glob("state-*.safetensors"):
        if old.name != f"state-{progress.step}.safetensors":
            old.unlink()


def _load(kept: Path, model: Reader, optimizer: torch.optim.Optimizer) -> Progress:
    if not (kept / "progress.json").is_file():
        return Progress()
    progress = Progress(**json.loads((kept / "progress.json").read_text()))
    device = str(next(model.parameters()).device)
    state = load_file(kept / f"state-{progress.step}.safetensors", device=device)
    model.load_state_dict({name[6:]: part for name, part in state.items() if name.startswith("model.")})
    for name, part in model.named_parameters():
        optimizer.state[part] = {
            key: state[f"{key}.{name}"].to("cpu" if key == "step" and not device.startswith("cuda") else device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return progress

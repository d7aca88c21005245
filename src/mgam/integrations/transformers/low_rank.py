"""Low-rank adapters that are added while a model runs and leave no trace when they are taken off.

They are read as PEFT writes them (`adapter_config.json`, `adapter_model.safetensors`), and need no PEFT.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mgam.errors import SettingError
from mgam.lasting import lasting
from mgam.policies.files import resolve

FOLDER = "lora"
"""Where a policy's folder keeps the adapter that belongs to it."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass
class Addition:
    """What one linear layer gets besides: (x down^T) up^T, scaled. Shapes: down (r, in), up (out, r)."""

    down: Tensor
    up: Tensor
    scale: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        states = args[0]
        if self.down.device != states.device or self.down.dtype != states.dtype:
            with lasting():
                self.down, self.up = self.down.to(states), self.up.to(states)
        return out + nn.functional.linear(nn.functional.linear(states, self.down), self.up) * self.scale


def adapters(name: str | Path) -> Path:
    """The folder whose adapters a name means: a folder, the shipped ones, or a hub id that is on this machine.

    Raises:
        SettingError: nothing of that name, or no adapters in it.
    """
    folder = resolve(name)
    if not (folder / FOLDER).is_dir():
        raise SettingError(
            f"{name} holds no adapters ({FOLDER}/{WEIGHTS} is wanted); make some with: mgam fit MODEL --adapter-only "
            "--data ... -o FOLDER"
        )
    return folder


def fingerprint(name: str | Path) -> str:
    """A hash of adapters.

    Raises:
        SettingError: as `adapters` does, and where they cannot be read.
    """
    place = adapters(name) / FOLDER
    try:
        return hashlib.sha256(b"".join((place / file).read_bytes() for file in (CONFIG, WEIGHTS))).hexdigest()
    except OSError as error:
        raise SettingError(f"the adapters in {place} cannot be read: {error}") from error


@lasting()
def read(model: Any, folder: Path) -> list[tuple[nn.Module, Addition]]:
    """What the adapter in `folder`, if there is one, adds to which layers of a model, which is left as it is.

    Raises:
        SettingError: the adapter is damaged, of a kind other than plain LoRA, or of another model.
    """
    place = folder / FOLDER
    if not place.is_dir():
        return []
    from safetensors.torch import load_file

    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(place / WEIGHTS)
        if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
            raise ValueError("it is no plain LoRA")
        rank, alpha = config["r"], config["lora_alpha"]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(f"the adapter in {place} cannot be used: {error}") from error
    modules = dict(model.named_modules())
    found: list[tuple[nn.Module, Addition]] = []
    downs = sorted(name for name in tensors if name.endswith(".lora_A.weight"))
    for name in downs:
        path = name.removesuffix(".lora_A.weight").removeprefix(PREFIX)
        module, up = modules.get(path), tensors.get(name.replace("lora_A", "lora_B"))
        down = tensors[name]
        if module is None or up is None or not _fits(module, down, up):
            raise SettingError(f"the adapter in {place} is of another model: {path} is missing here or of other shape")
        found.append((module, Addition(down, up, scale)))
    return found


def attach(additions: Sequence[tuple[nn.Module, Addition]]) -> list[Any]:
    """Adds what `read` found; returns the hooks whose removal takes it off."""
    return [module.register_forward_hook(addition) for module, addition in additions]


def _fits(module: nn.Module, down: Tensor, up: Tensor) -> bool:
    wide = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return wide == (down.shape[1], up.shape[0]) and down.shape[0] == up.shape[1]

"""Policies in folders: weights as safetensors, and a configuration that says which model they were fitted to."""

from __future__ import annotations

import functools
import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.lasting import lasting
from mgam.policies.learned_search import PARTS, SearchWeights

WEIGHTS, CONFIG = "policy.safetensors", "policy.json"
FORMAT, VERSION = "mgam policy", 4
EVEN = 3
"""The version before, whose heads are of one importance."""
NEAR_ENOUGH = 0.02
"""How far the sizes of a model's weights may be from those of the model that a policy was fitted to, relatively: other
number formats and small adapters pass, other models do not."""


@dataclass(frozen=True)
class ModelShape:
    """What a model must be like so that a policy fits it: no names, only what can be measured."""

    model_type: str
    vocabulary: int
    layers: dict[str, tuple[int, int, int]]
    """Per layer that attends in full: KV heads, query heads of a group, head dim."""
    sizes: dict[str, float]
    """Per layer: mean absolute weight of its attention."""

    def refuse(self, other: ModelShape) -> list[str]:
        """Why a policy for this model cannot serve `other`."""
        found = []
        if self.model_type != other.model_type:
            found.append(f"it was fitted to a {self.model_type} model, this one is {other.model_type}")
        if self.layers != other.layers:
            found.append(f"it has {_say(self.layers)}, this model {_say(other.layers)}")
        if self.vocabulary != other.vocabulary:
            found.append(f"its model knows {self.vocabulary} tokens, this one {other.vocabulary}")
        if not found:
            off = [
                layer
                for layer, size in self.sizes.items()
                if abs(other.sizes.get(layer, 0.0) - size) > NEAR_ENOUGH * size
            ]
            if off:
                found.append(
                    f"the weights of {len(off)} of {len(self.sizes)} layers have other sizes than those of the model "
                    "that it was fitted to"
                )
        return found


def _say(layers: Mapping[str, tuple[int, int, int]]) -> str:
    shapes = sorted(set(layers.values()))
    first = ", ".join(f"{heads} KV heads of {group} query heads and {dim} dimensions" for heads, group, dim in shapes)
    return f"{len(layers)} layers with {first}"


@dataclass(frozen=True)
class FittedPolicy:
    """The searches of a model's layers, and how they were made."""

    model: ModelShape
    width: int
    slots: int
    search: int
    """Tokens per search key."""
    layers: dict[int, SearchWeights]
    marks: tuple[tuple[float, float], ...] = ()
    """Shares of all attention that are read as tokens, rising, and what a chunk must be worth for each; measured."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that it was chosen for."""
    notes: dict[str, Any] = field(default_factory=dict)
    """How it was fitted, for people."""
    folder: Path | None = None

    @property
    def parameters(self) -> int:
        """Numbers that it holds."""
        return sum(getattr(layer, part).numel() for layer in self.layers.values() for part in PARTS)

    def mark(self, recall: float) -> float:
        """What a chunk must be worth so that this share of all attention is read, on average over texts.

        Raises:
            SettingError: the policy was fitted without measuring it.
        """
        if not self.marks:
            raise SettingError(
                f"recall={recall}: what it takes was not measured for the policy in {self.folder or 'memory'}; fit it "
                "again, or leave recall out"
            )
        shares, worths = zip(*self.marks, strict=True)
        above = bisect_left(shares, recall)
        if above == len(shares):
            return 0.0
        if not above:
            return float(worths[0])
        part = (recall - shares[above - 1]) / (shares[above] - shares[above - 1])
        return float(worths[above - 1] * (1 - part) + worths[above] * part)

    def check(self, model: ModelShape, search: int) -> None:
        """Refuses a model that it was not fitted to.

        Raises:
            SettingError: with every reason.
        """
        reasons = self.model.refuse(model)
        if self.search != search:
            reasons.append(f"it knows search keys of {self.search} tokens, not of {search}")
        if reasons:
            raise SettingError(
                f"the policy in {self.folder or 'memory'} does not fit: {'; '.join(reasons)}; "
                "fit one to this model with: mgam fit MODEL --data ... -o FOLDER"
            )

    def save(self, folder: Path) -> None:
        """Writes weights, in half precision, and configuration."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for number, layer in self.layers.items():
            for part in PARTS:
                kept = torch.float32 if part.endswith(("bias", "prior")) else torch.float16
                tensors[f"{number}.{part}"] = getattr(layer, part).detach().to("cpu", kept).contiguous()
        save_file(tensors, folder / WEIGHTS)
        body = {
            "format": FORMAT, "version": VERSION, "model": asdict(self.model), "width": self.width,
            "slots": self.slots, "search": self.search, "marks": self.marks, "defaults": self.defaults,
            "notes": self.notes,
        }  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> FittedPolicy:
        """Reads a folder; the same folder is read once.

        Raises:
            SettingError: not a policy, damaged, or of another format.
        """
        path = Path(folder).expanduser()
        try:
            stamp = tuple((path / name).stat().st_mtime_ns for name in (WEIGHTS, CONFIG))
        except OSError as error:
            raise SettingError(
                f"{folder} holds no policy ({CONFIG} and {WEIGHTS} are wanted); make one with: "
                "mgam fit MODEL --data ... -o FOLDER"
            ) from error
        return _load(path, stamp)


@functools.lru_cache(maxsize=4)
@lasting()
def _load(path: Path, stamp: tuple[int, ...]) -> FittedPolicy:
    from safetensors.torch import load_file

    try:
        body = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if body.get("format") != FORMAT or body.get("version") not in (EVEN, VERSION):
            raise ValueError(f"format {body.get('format')!r} {body.get('version')!r}, wanted {FORMAT!r} {VERSION}")
        raw = (path / WEIGHTS).read_bytes()
        tensors = load_file(path / WEIGHTS)
        shape = body["model"]
        model = ModelShape(
            shape["model_type"],
            shape["vocabulary"],
            {layer: (value[0], value[1], value[2]) for layer, value in shape["layers"].items()},
            shape["sizes"],
        )
        name = hashlib.sha256(raw).hexdigest()[:16]
        if body["version"] == EVEN:
            tensors |= {f"{number}.importance": torch.ones(shape[0]) for number, shape in model.layers.items()}
        layers = {
            int(number): SearchWeights(
                f"{name}.{number}", body["slots"], *(tensors[f"{number}.{part}"].float() for part in PARTS)
            )
            for number in model.layers
        }
        for number, weights in layers.items():
            _check_shapes(weights, model.layers[str(number)], body["width"], body["slots"])
        return FittedPolicy(
            model,
            body["width"],
            body["slots"],
            body["search"],
            layers,
            tuple((float(share), float(worth)) for share, worth in body.get("marks", ())),
            body["defaults"],
            body["notes"],
            path,
        )
    except Exception as error:
        raise SettingError(f"the policy in {path} is damaged or of another format ({error}); fit it again") from error


def _check_shapes(weights: SearchWeights, shape: tuple[int, int, int], width: int, slots: int) -> None:
    heads, group, dim = shape
    wanted = {
        "query": (heads, group * dim, slots * width),
        "query_bias": (heads, slots * width),
        "key": (heads, dim, width - 1),
        "key_bias": (heads, width - 1),
        "voice": (heads, group * dim),
        "voice_bias": (heads,),
        "seek": (heads, dim, width - 1),
        "content": (heads,),
        "importance": (heads,),
    }
    wanted["prior"] = (heads, weights.prior.shape[-1])
    for part, expected in wanted.items():
        found = getattr(weights, part)
        if tuple(found.shape) != expected or not bool(torch.isfinite(found).all()):
            raise ValueError(
                f"{part} has shape {tuple(found.shape)} (wanted {expected}) or numbers that are not finite"
            )


def resolve(name: str | Path) -> Path:
    """The folder that the name of a policy, or of adapters, means: a folder, a shipped one, or a hub id that is here.

    Raises:
        SettingError: nothing of that name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    shipped = Path(__file__).parent.parent / "adapters" / str(name)
    if shipped.is_dir() and str(name).replace("-", "").replace("_", "").replace(".", "").isalnum():
        return shipped
    text = str(name)
    if text.count("/") == 1 and not text.startswith((".", "~", "/")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors"], local_files_only=True))
        except Exception as error:
            raise SettingError(
                f"{name} is no folder, and no hub id that is on this machine; fetch it with: hf download {name}"
            ) from error
    raise SettingError(
        f"there is no policy and no adapter {name}: give a folder that mgam fit wrote, a hub id, or "
        "one that is shipped (policy default, adapter lookup)"
    )

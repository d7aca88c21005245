"""How much memory reading a text takes, how much is free, and how much was used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgam.errors import MemoryBudgetError

if TYPE_CHECKING:
    import torch

# What a pyramid holds beside the keys and values of the tokens, in keys' sizes for each token: search keys of four
# tokens each, and a key and a value for each chunk of 64, of 1024, ...
SEARCH_KEYS_SHARE = 1 / 4
SUMMARIES_SHARE = 2 / 64 + 2 / 1024
GROWTH_SHARE = 0.10  # a layer that grows holds its old buffers and its new ones for a moment
WORKING_BYTES = 400 * 2**20  # activations of one chunk of the prompt, scores of the search, the interpreter


@dataclass(frozen=True)
class ReadingNeed:
    """Bytes that reading a text takes beyond the loaded weights."""

    keys_values: int
    pyramid: int
    working: int

    @property
    def total(self) -> int:
        return self.keys_values + self.pyramid + self.working


def estimate_reading(config: Any, tokens: int, *, bytes_per_number: int) -> ReadingNeed:
    """What reading `tokens` tokens takes with a model of this transformers configuration.

    Every layer is counted as one that keeps all its keys and values, so a hybrid model needs less than this says.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = tokens * text.num_hidden_layers * heads * width * bytes_per_number
    pyramid = keys * (SEARCH_KEYS_SHARE + SUMMARIES_SHARE) + 2 * keys * GROWTH_SHARE
    return ReadingNeed(2 * keys, int(pyramid), WORKING_BYTES)


def refuse_if_too_large(model: Any, tokens: int, *, free_bytes: int | None = None) -> ReadingNeed:
    """Estimate what reading `tokens` tokens takes with `model`, and refuse when that much is not free.

    `free_bytes` replaces what the machine says is free on the model's device.

    Raises:
        MemoryBudgetError: says how much is needed, how much is free, and what would fit.
    """
    device: torch.device = model.device
    bytes_per_number: int = model.dtype.itemsize
    need = estimate_reading(model.config, tokens, bytes_per_number=bytes_per_number)
    free = available_bytes(device) if free_bytes is None else free_bytes
    if free is None or need.total <= free:
        return need
    per_token = (need.total - need.working) / max(tokens, 1)
    fitting = max(int((free - need.working) / per_token), 0) // 1000 * 1000
    dials = [f"give a text of at most about {fitting:,} tokens" if fitting else "free some memory"]
    if bytes_per_number > 2:
        dials.append("halve the need with --dtype bfloat16 (dtype='bfloat16' in Python)")
    dials.append("choose a model with fewer layers or KV heads with --model")
    share = f"{_gib(need.keys_values)} of it for keys and values"
    raise MemoryBudgetError(
        f"reading {tokens:,} tokens takes about {_gib(need.total)} on {device} ({share}), and {_gib(free)} are free; "
        + ", or ".join(dials)
    )


def refuse_weights_if_too_large(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model folder whose weights, in `dtype`, are more than what is free on `device`.

    Raises:
        MemoryBudgetError: says how much is needed and what helps.
    """
    need = weight_bytes(folder, dtype)
    free = available_bytes(device)
    if free is not None and need > free:
        half = "; --dtype bfloat16 halves that" if dtype.itemsize > 2 else ""
        raise MemoryBudgetError(
            f"the weights in {folder} take {_gib(need)} as {str(dtype).removeprefix('torch.')} on {device}, and "
            f"{_gib(free)} are free{half}; or choose a smaller model with --model"
        )


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the weights in `folder` in `dtype`; packed ones stay packed, files that cannot be read are left out."""
    import math

    from safetensors import SafetensorError, safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    kind = str(part.get_dtype())
                    size = dtype.itemsize if kind in _FLOATS else _stored_bytes(kind)
                    total += math.prod(part.get_shape()) * size
        except (SafetensorError, OSError):
            continue
    return total


_FLOATS = ("F64", "F32", "F16", "BF16")


def _stored_bytes(kind: str) -> int:
    """Bytes of a number as safetensors names its type: `I8`, `U8`, `F8_E4M3`, `I64`, `BOOL`."""
    bits = "".join(filter(str.isdigit, kind.partition("_")[0]))
    return max(1, int(bits or 8) // 8)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had on `device` now, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [limit for limit in (_system_available(), _cgroup_available()) if limit is not None]
    return min(limits, default=None)


def total_bytes() -> int | None:
    """Main memory of this machine in bytes; None where the system does not tell."""
    if (total := _meminfo("MemTotal")) is not None:
        return total
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory_bytes() -> int:
    """The most that this process has held so far, in bytes: main memory, plus each CUDA device's peak in torch."""
    return _peak_resident() + _peak_cuda()


def _peak_resident() -> int:
    if (peak := _field(Path("/proc/self/status"), "VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return _peak_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_windows() -> int:
    try:
        import psutil
    except ImportError:
        return 0
    return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))


def _peak_cuda() -> int:
    torch = sys.modules.get("torch")  # a process that never imported torch holds nothing on a GPU
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return sum(int(torch.cuda.max_memory_reserved(number)) for number in range(torch.cuda.device_count()))


def _system_available() -> int | None:
    if (available := _meminfo("MemAvailable")) is not None:
        return available
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _cgroup_available() -> int | None:
    """What a container's limit leaves; page cache counts as free, as the kernel gives it back."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return max(limit - used + int(statistics.get("inactive_file", 0)), 0)
    except (OSError, ValueError):  # no container, or "max": no limit
        return None


def _meminfo(name: str) -> int | None:
    return _field(Path("/proc/meminfo"), name)


def _field(path: Path, name: str) -> int | None:
    """The value in bytes of the line `name:   1234 kB`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(values[0]) * 1024 if values else None


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"

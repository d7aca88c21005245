"""What the commands for digests share: finding one, and loading the model that made it."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgam.cli.progress import Stage
    from mgam.documents.document import Document
    from mgam.documents.store.manifest import Manifest
    from mgam.integrations.loading import Loaded

SUFFIX = ".mgam"
MEMORY_HELP = "Bound of keys, values, summaries and search keys, such as 2GiB; weights and work come on top."


class Tier(StrEnum):
    """Where pages wait."""

    DISK = "disk"
    HOST = "host"


TIER_HELP = "Where pages wait: on disk, or in main memory (host: slower to open, then quicker), pinned for a GPU."
AGAIN = 2048
"""Tokens that `ask` and `chat` read a second time, if they are not told another number."""
AGAIN_HELP = "Passages that are read again, by themselves, before the answer; 0: it comes at first sight."
ADAPTER_HELP = "Adapters with which the model looks things up: from mgam fit --adapter-only, a hub id, or none."
ADAPTER_DEFAULT = "lookup, which is shipped, with the default model"


def adapter_of(model: Any, adapter: str | None, policy: str | None = None) -> dict[str, Any]:
    """The setting for adapters that were asked for. The default model reads with those that are shipped for it, but not
    by a learned policy, which knows the model without them."""
    from mgam.integrations.loading import DEFAULT_MODEL

    if adapter is None:
        default = getattr(model, "name_or_path", None) == DEFAULT_MODEL and policy is None
        return {"adapter": "lookup"} if default else {}
    return {} if adapter == "none" else {"adapter": adapter}


def in_words(name: str, value: Any) -> str:
    """A setting of a digest, as in `with budget 1024` and `without adapter`."""
    return f"without {name}" if value is None else f"with {name} {value}"


def is_digest(name: str) -> bool:
    """Whether a name is that of a digest, be it whole or not."""
    from mgam.documents.store.manifest import NAME

    path = Path(name)
    return (path.suffix == SUFFIX and not path.is_file()) or (path / NAME).is_file()


def load_for(
    manifest: Manifest, model: str | None, device: str, download: bool, stage: Stage, dtype: str | None = None
) -> Loaded:
    """The model of a digest: the one named, else the one that made it."""
    from mgam.integrations.loading import DEFAULT_MODEL, load

    made_with = manifest.model["name"]
    name = model or (None if made_with == DEFAULT_MODEL else made_with)
    stage.say("loading the model")
    return load(name, device=device, dtype=dtype or manifest.shape.dtype, download=download, on_status=stage.say)


def open_document(
    path: str,
    model: str | None,
    device: str,
    download: bool,
    memory: str | None,
    stage: Stage,
    question_budget: int | None = None,
    reread: int | None = None,
    tier: Tier = Tier.DISK,
) -> tuple[Document, dict[str, float]]:
    """An open digest, and the seconds that loading the model and opening took."""
    from mgam.documents.document import Document
    from mgam.documents.store.manifest import Manifest
    from mgam.documents.tiers import parse_memory

    parse_memory(memory)
    manifest = Manifest.read(Path(path))  # before a model is loaded for nothing
    started = time.perf_counter()
    loaded = load_for(manifest, model, device, download, stage)
    between = time.perf_counter()
    if reread is None and manifest.settings.method == "mgam":
        reread = AGAIN
    stage.say("opening the digest")
    document = Document.open(
        path,
        loaded.model,
        loaded.tokenizer,
        memory=memory,
        tier=tier.value,
        question_budget=question_budget,
        reread=reread,
    )
    seconds = {"loading": between - started, "opening": time.perf_counter() - between}
    for name in document.changed():
        stage.say(f"note: {name} has changed since it was digested; the answer is from the text as it was")
    return document, {name: round(count, 3) for name, count in seconds.items()}


def facts(manifest: Manifest, path: Path) -> dict[str, Any]:
    """What a digest holds, as plain values."""
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file() and not file.is_symlink())
    shape = manifest.shape
    return {
        "path": str(path),
        "complete": manifest.complete,
        "tokens": manifest.tokens,
        "digested": manifest.done,
        "segments": len(manifest.segments),
        "bytes": size,
        "bytes_per_token": round(size / max(manifest.done, 1), 1),
        "resident_bytes_per_token": round(shape.resident_bytes_per_token, 1),
        "page_bytes_per_token": round(shape.page_bytes_per_token, 1),
        "bits": shape.bits,
        "dtype": shape.dtype,
        "model": manifest.model,
        "settings": {**manifest.settings.as_dict(), "dense_until": manifest.dense_until},
        "texts": [{"name": text.name, "bytes": text.bytes, "sha256": text.sha256} for text in manifest.texts],
        "made_with": manifest.made_with,
    }

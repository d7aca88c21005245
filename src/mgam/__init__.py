"""mgam: language models that read very long documents with multi-granular attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgam.documents.document import Document
    from mgam.documents.reading import reader
    from mgam.integrations.transformers.apply import applied, apply, remove
    from mgam.integrations.transformers.cache import PyramidCache
    from mgam.integrations.transformers.trained import load_trained, train_with
    from mgam.settings import Settings

__version__ = "0.1.0"
__all__ = [
    "Document", "PyramidCache", "Settings", "__version__", "applied", "apply", "load_trained", "reader", "remove",
    "train_with",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Loads the parts that need torch and transformers when they are first asked for."""
    if name == "Settings":
        from mgam.settings import Settings

        return Settings
    if name == "Document":
        from mgam.documents.document import Document

        return Document
    if name == "reader":
        from mgam.documents.reading import reader

        return reader
    if name in ("train_with", "load_trained"):
        from mgam.integrations.transformers import trained

        return getattr(trained, name)
    if name in ("apply", "applied", "remove", "PyramidCache"):
        from mgam.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module 'mgam' has no attribute {name!r}")

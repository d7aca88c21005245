"""Multi-granular attention in Hugging Face transformers."""

from mgam.integrations.transformers.apply import Applied, applied, applied_to, apply, remove
from mgam.integrations.transformers.cache import PyramidCache

__all__ = ["Applied", "PyramidCache", "applied", "applied_to", "apply", "remove"]

"""Methods by name: each a policy with its positions and what it declares about itself."""

from mgam.methods.registry import METHODS, Method, get, names

__all__ = ["METHODS", "Method", "get", "names"]

"""Loaders for published data sets, from their hub or from files of the same fields."""

from mgam.evaluation.published.hub import DATASETS, fetch_published

__all__ = ["DATASETS", "fetch_published"]

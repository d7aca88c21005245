"""Attention over a cover: one softmax, several backends, one place that picks."""

from mgam.attend.dispatch import Choice, attend, choose, watched

__all__ = ["Choice", "attend", "choose", "watched"]

"""The task families, one file each; importing this package registers them all."""

from mgam.evaluation.tasks import (
    citation,
    factbook,
    key_value,
    loss,
    needles,
    passkey,
    published,
    questions,
    threading,
    variables,
    wikipedia,
    words,
)

__all__ = [
    "citation",
    "factbook",
    "key_value",
    "loss",
    "needles",
    "passkey",
    "published",
    "questions",
    "threading",
    "variables",
    "wikipedia",
    "words",
]

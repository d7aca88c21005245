"""The task families, one file each; importing this package registers them all."""

from mgam.evaluation.tasks import key_value, needles, passkey, questions, threading, variables, words

__all__ = ["key_value", "needles", "passkey", "questions", "threading", "variables", "words"]

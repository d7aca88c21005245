"""Quick turns of threads, for stretches in which some work in Python while others read, hash and copy beside them.

A thread that comes back from reading a few megabytes waits for the interpreter, by default five milliseconds where
another one computes in Python. That is longer than the reading took: nothing would be done beside anything.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL = 2e-4
"""Seconds after which a thread that computes lets others that wait have a turn."""

_lock = threading.Lock()
_within = 0
_usual = 0.0


@contextmanager
def quick_turns() -> Iterator[None]:
    """Quick turns in this context, in all threads; then what was set before."""
    global _within, _usual
    with _lock:
        if not _within:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(INTERVAL, _usual))
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                sys.setswitchinterval(_usual)

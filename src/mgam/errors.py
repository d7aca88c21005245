"""Errors that a person can act on.

Every message says what was given, what is wanted, and what to do. The command line prints a `MgamError` as one line and
ends with exit code 2; anything else that is raised is a fault of this library.
"""

from __future__ import annotations


class MgamError(Exception):
    """Base of all errors that are caused by what the user gave, and that the user can mend."""

    @property
    def kind(self) -> str:
        """Stable name of the error for machines, as in `{"error": {"kind": "DocumentError", ...}}`."""
        return type(self).__name__


class SettingError(MgamError, ValueError):
    """A setting has a value that cannot work: not a number, out of range, or at odds with another setting."""


class UnsupportedModelError(MgamError):
    """The model, or the mode that it is asked to run in, is refused; the message lists every reason."""


class DocumentError(MgamError):
    """A document cannot be read: missing, empty, binary, undecodable or too large."""


class DigestError(MgamError):
    """A digest cannot be used: damaged, unfinished, in use, of another model, of another format, or not a digest."""


class ModelFileError(MgamError):
    """A model cannot be loaded: not found, incomplete, damaged, or not available without the network."""


class MemoryBudgetError(MgamError):
    """The work does not fit into the memory that is free; the message says how much is needed and which dial helps."""

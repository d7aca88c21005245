"""Names of the files that a digest writes: what has another name is not its own, and is left alone."""

from __future__ import annotations

import re

from mgam.documents.store.files import TEMPORARY
from mgam.documents.store.lock import NAME as LOCK
from mgam.documents.store.manifest import NAME as MANIFEST
from mgam.documents.store.neutral import NAME as NEUTRAL

_NUMBERED = re.compile(r"text-[0-9]{6,}\.txt|segment-[0-9]{6,}(-[0-9]{6,})?\.safetensors")  # `Text`, `Segment.file_of`


def is_ours(name: str) -> bool:
    """Whether a digest writes files of this name; another program may do so too."""
    plain = name.removesuffix(TEMPORARY)
    return plain in (LOCK, MANIFEST, NEUTRAL) or _NUMBERED.fullmatch(plain) is not None

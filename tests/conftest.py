"""What all tests share."""

from __future__ import annotations

import importlib.util
import os


def _mend_interpreter() -> None:
    """NumPy 2.4 no longer turns an array of one element into an integer, which Triton 3.6's interpreter relies on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: object, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended


if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
    _mend_interpreter()

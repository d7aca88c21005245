"""Makes docs/models.md: every model of the table by every feature, from the checks that the tests run.

    python scripts/models_table.py [--write]

Without --write it prints the table. A check that fails ends the script, so that no table is made of broken things.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.models.features import FEATURES  # noqa: E402
from tests.models.zoo import ZOO  # noqa: E402

from mgam.integrations.transformers.models import NATIVE, TABLE  # noqa: E402

HEAD = """# Models

Every model below runs every feature on a tiny random configuration; `scripts/models_table.py` made this page from the
checks in `tests/models/features.py`, which the tests run too. A tick says that the check passed; a number leads to the
reason why it does not apply.

Made with transformers {transformers} and torch {torch} on the CPU. `make test-oldest` runs the same checks with the
oldest transformers that mgam accepts.
"""

FORMATS = """## Formats and devices that are not a row of the table

- **GGUF**: a file is unpacked once into a folder of safetensors, in bfloat16 (float32 where the file holds that), and
  read from there: what is packed is not kept packed. `tests/test_loading.py` compares the numbers with gguf's own.
  A model that transformers reads by `gguf_file=` is unpacked by it and served as any other (tested there too).
  transformers computes with packed numbers for three partly recurrent architectures only, which mgam refuses.
- **Layers on two devices, and Apple's MPS**: tested by code path on four models that are unlike one another
  (`tests/models/test_placement.py`), with tensors that say they lie elsewhere and refuse what a real device refuses.
  Where there are two CUDA devices, a test uses them (`tests/models/test_ways_in.py`).
- **CUDA**: `make test` runs kernels and models there where there is a device, and skips that where there is none."""


def main() -> None:
    """Runs all checks and prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/models.md instead of printing")
    write = parser.parse_args().write
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    cells, reasons = {}, []
    for tiny in ZOO:
        for feature, check in FEATURES.items():
            print(f"{tiny.name}: {feature}", file=sys.stderr)
            reason = check(tiny)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells[tiny.name, feature] = "✓" if reason is None else f"[{reasons.index(reason) + 1}]"
    page = _page(cells, reasons)
    if write:
        (ROOT / "docs" / "models.md").write_text(page, encoding="utf-8")
    else:
        print(page)


def _page(cells: dict[tuple[str, str], str], reasons: list[str]) -> str:
    lines = [HEAD.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])]
    lines += ["## What each can do", "", "| feature | " + " | ".join(tiny.name for tiny in ZOO) + " |"]
    lines += ["|---|" + "---|" * len(ZOO)]
    for feature in FEATURES:
        lines.append(f"| {feature} | " + " | ".join(cells[tiny.name, feature] for tiny in ZOO) + " |")
    lines += [""] + [f"[{number}] {reason}\n" for number, reason in enumerate(reasons, 1)]
    lines += ["## What the features mean", ""]
    for feature, check in FEATURES.items():
        said = " ".join((check.__doc__ or "").split())
        lines.append(f"- **{feature}**: {said}")
    lines += ["", "## The models", "", "| model type | known as | unlike Llama |", "|---|---|---|"]
    lines += [f"| `{row.model_type}` | {row.known_as} | {row.odd or '(nothing)'} |" for row in TABLE.values()]
    lines += ["", "## Refused", "", "These are refused with the reason, not read densely in silence:", ""]
    by_reason: dict[str, list[str]] = {}
    for name, reason in NATIVE.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    lines += [
        "- models that read images or sound too, encoders and encoder-decoders, and models whose every layer slides",
        "- any other model type: the message names the row to add (CONTRIBUTING.md, 'Add a model')",
        "",
        *FORMATS.splitlines(),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

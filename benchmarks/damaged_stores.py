"""Damages digests in thousands of ways and checks that each is refused or stopped, or answers as the whole one does.

    python benchmarks/damaged_stores.py --trials 10000 --out damaged.json

Each trial damages a copy of a small digest (bits flipped, files cut, swapped, foreign, links, forged manifests with
huge sizes or names that lead out, ...), verifies it, opens it and asks a question. The address space is bounded, so
that memory taken for a declared size is seen as a crash.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

BOUND = 2 << 30  # bytes of address space beyond what the libraries take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--eight-bits", action="store_true", help="digests in 8 bits")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import torch
    from tests.documents import tiny
    from tests.documents.test_damage import make_scene

    torch.set_num_threads(1)
    began = time.perf_counter()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        scene = make_scene(Path(folder), tiny.make_tokenizer(), arguments.eight_bits)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + BOUND, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for number in range(arguments.trials):
            try:
                outcomes[scene.trial(Path(folder) / "it.mgam", arguments.first + number)] += 1
            except Exception as error:
                outcomes[f"FAILED at seed {arguments.first + number}: {type(error).__name__}: {error}"[:300]] += 1
            if number % 500 == 499:
                print(f"{number + 1} trials, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    failed = [outcome for outcome in outcomes if outcome.startswith("FAILED")]
    result = {
        "trials": arguments.trials,
        "first_seed": arguments.first,
        "eight_bits": arguments.eight_bits,
        "failed": failed,
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(time.perf_counter() - began, 1),
        "torch": torch.__version__,
        "threads": 1,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

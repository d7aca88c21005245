"""One table of all methods, by one command for each part; what was measured before is gone on from.

python experiments/methods_table/run.py decoders --out FOLDER --minutes 8      methods of unmodified decoders
python experiments/methods_table/run.py trained --out FOLDER --workers 8       small models from scratch
python experiments/methods_table/run.py growth --out FOLDER                    time and memory from 1k to 128k tokens
python experiments/methods_table/run.py table --out FOLDER                     what is there, as Markdown and plots
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import decoders
import growth
import tables
import torch
import trained

from mgam.errors import MgamError


def main() -> None:
    """Reads the command line and runs a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("decoders", "worker", "trained", "growth", "table"))
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="", help="names with commas; all of the part if not given")
    parser.add_argument("--workers", type=int, default=4, help="processes that share the device")
    own = parser.add_argument_group("decoders")
    own.add_argument("--model", help="hub id, folder or GGUF file; the default model if not given")
    own.add_argument("--tasks", default=decoders.TASKS)
    own.add_argument("--lengths", default="", help="decoders: 8k,32k,128k, in the order wanted; trained: 64")
    own.add_argument("--trials", type=int, default=5, help="trials at most, per task, length and method")
    own.add_argument("--minutes", type=float, help="when to end, whatever is done; decoders: 8, growth: no end")
    own.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    own.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    own = parser.add_argument_group("trained")
    own.add_argument("--width", type=int, default=64)
    own.add_argument("--rows", type=int, default=64, help="texts per step")
    own.add_argument("--steps", type=int, default=3000)
    own.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    own = parser.add_argument_group("growth")
    own.add_argument("--shortest", type=int, default=1024)
    own.add_argument("--longest", type=int, default=131072)
    own.add_argument("--enough", type=float, default=40.0, help="seconds of a pass from which on a method ends")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "table":
        tables.write(options.out)
    elif options.part in ("decoders", "worker"):
        options.methods = options.methods or decoders.METHODS
        options.lengths, options.minutes = options.lengths or "8k,32k,128k", options.minutes or 8.0
        (decoders.measure if options.part == "decoders" else decoders.work)(options)
    else:
        options.lengths = options.lengths or "64"
        for line in (trained.measure if options.part == "trained" else growth.measure)(options):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    try:
        main()
    except MgamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

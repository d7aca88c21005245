"""Invented texts of every source, where `mgam data fetch` would put them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SOUNDS = ("ka", "lo", "mi", "ren", "tos", "vel", "zan", "dur", "esh", "pol", "gar", "nim")
LABELS = {
    "Geography": ("Highest point", "Coastline", "Climate", "Terrain"),
    "Economy": ("Exports", "Imports", "Main crop", "Labour force"),
    "Energy": ("Electricity", "Crude oil", "Main source"),
}


def write(root: Path) -> None:
    """Forty countries, twenty articles, twelve texts with names."""
    rng = random.Random("a world for the table")
    names = list(dict.fromkeys("".join(rng.sample(SOUNDS, 3)).capitalize() for _ in range(120)))
    words = ["".join(rng.sample(SOUNDS, 2)) for _ in range(200)]

    def some(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    def prose(sentences: int) -> str:
        return " ".join(f"The {some(9)} {rng.randrange(99)}." for _ in range(sentences))

    def tale(sentences: int) -> str:
        return " ".join(f"Then {some(4)} saw {rng.choice(names[:9])} near {some(4)}." for _ in range(sentences))

    def country(name: str) -> dict[str, Any]:
        facts = {
            section: {label: {"text": f"{rng.choice(words)} {rng.randrange(999)}; of old"} for label in labels}
            for section, labels in LABELS.items()
        }
        return {**facts, "Government": {"Country name": {"conventional short form": {"text": name}}}}

    articles = [{"title": name, "lead": prose(8), "body": prose(70)} for name in names[:20]]
    sources = {
        "factbook": {f"{name}.json": json.dumps(country(name)) for name in names[:40]},
        "wikipedia": {f"{one['title']}.json": json.dumps(one) for one in articles},
        "novels": {f"novel-{number}.txt": tale(200) for number in range(12)},
        "speeches": {f"speech-{number}.txt": tale(60) for number in range(24)},
    }
    for source, files in sources.items():
        (root / source).mkdir()
        for name, text in files.items():
            (root / source / name).write_text(text, encoding="utf-8")
        (root / source / "manifest.json").write_text('{"sha256": "invented"}')

"""Brings records of published data sets into the cache: from the hub when online, or from files of the same fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgam.errors import DocumentError, SettingError
from mgam.evaluation.published.records import PARSERS, RecordError, plain

OFFLINE = "without it, `mgam eval --tasks synthetic` runs offline, and files can be read with --from FOLDER"


@dataclass(frozen=True)
class Dataset:
    """Where a data set lives on the hub. Only data files are read, a loading script is never run."""

    hub: str
    config: str | None
    split: str  # the one that is reported on and has answers
    licence: str
    what: str
    revision: str | None = None
    limit: int = 200  # records that are kept; seeds draw from these


DATASETS: dict[str, Dataset] = {
    "hotpotqa": Dataset(
        "hotpotqa/hotpot_qa", "distractor", "validation", "CC BY-SA 4.0", "HotpotQA, distractor setting",
        "refs/convert/parquet", 500,
    ),
    "narrativeqa": Dataset(
        "deepmind/narrativeqa", None, "test", "Apache-2.0", "NarrativeQA, full stories, one question of each",
    ),
    "cnn_dailymail": Dataset(
        "abisee/cnn_dailymail", "3.0.0", "test", "Apache-2.0", "CNN/DailyMail 3.0.0, non-anonymised", None, 500
    ),
    "longbench": Dataset(
        "zai-org/LongBench", None, "test", "MIT, parts under their own", "LongBench, English tasks",
        "refs/convert/parquet", 200,
    ),
}  # fmt: skip

LONGBENCH_TASKS = (
    "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news trec triviaqa samsum "
    "passage_count passage_retrieval_en lcc repobench-p"
)


def fetch_published(name: str, source: Path | None = None) -> dict[str, str]:
    """File names and contents of the records of a data set, for the text cache.

    Raises:
        SettingError: `source` is given and holds no records.
        DocumentError: the hub cannot be reached, or a record has not the fields that are documented for it.
    """
    rows = _from_folder(name, source) if source is not None else _from_hub(name)
    found: dict[str, str] = {}
    stories: set[str] = set()
    for number, raw in enumerate(rows):
        try:
            record = PARSERS[name](raw)
        except RecordError as error:
            if name == "cnn_dailymail" and str(error).startswith("article"):
                continue  # some articles are known to be empty
            raise DocumentError(f"record {number} of {name} is not as documented: {error}") from error
        if name == "narrativeqa":
            story = str(raw["document"].get("id"))
            if story in stories:
                continue
            stories.add(story)
        found[f"{len(found):05d}.json"] = json.dumps(plain(record), ensure_ascii=False)
        if name != "longbench" and len(found) >= DATASETS[name].limit:
            break
    return found


def _from_folder(name: str, folder: Path) -> Iterator[Mapping[str, Any]]:
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")]) if folder.is_dir() else []
    if not files:
        raise SettingError(f"{folder} holds no .jsonl or .json files with records of {name}")
    for file in files:
        text = file.read_text(encoding="utf-8")
        try:
            rows = (
                json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
            )
        except ValueError as error:
            raise DocumentError(f"{file} is not JSON: {error}") from error
        yield from rows


def _from_hub(name: str) -> Iterator[Mapping[str, Any]]:
    chosen = DATASETS[name]
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]  # an extra
    except ImportError as error:
        raise DocumentError(
            f"{name} is read with the `datasets` package; pip install 'mgam[eval]'; {OFFLINE}"
        ) from error
    configs = LONGBENCH_TASKS.split() if name == "longbench" else [chosen.config]
    try:
        for config in configs:
            rows = _guarded(load_dataset, chosen, config)
            for number, row in enumerate(rows):
                if name == "longbench" and number >= chosen.limit:
                    break
                yield row
    except DocumentError:
        raise
    except Exception as error:  # network libraries raise their own kinds
        raise DocumentError(f"the data set {chosen.hub} cannot be reached ({_short(error)}); {OFFLINE}") from error


def _guarded(load: Callable[..., Any], chosen: Dataset, config: str | None) -> Any:
    return load(chosen.hub, config, split=chosen.split, revision=chosen.revision, streaming=True)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

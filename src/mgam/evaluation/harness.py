"""Our tasks as tasks of lm-evaluation-harness: the same samples and scorers, answered by the harness's models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mgam.documents.prompt import AFTER, BEFORE
from mgam.errors import SettingError
from mgam.evaluation.paths import replace_file
from mgam.evaluation.registry import Task, all_tasks
from mgam.evaluation.sample import Request, Sample
from mgam.evaluation.texts import TextLibrary
from mgam.evaluation.tokens import TokenCounter

SCRIPT = '''"""Scores a reply as mgam does."""

from mgam.evaluation.harness import score


def process_results(doc, results):
    return {"score": score(doc, results[0])}
'''
YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{gold}}}}"
process_results: !function mgam_score.process_results
metric_list:
  - metric: score
    aggregation: mean
    higher_is_better: true
generation_kwargs:
  do_sample: false
  max_gen_toks: {limit}
  until: []
metadata:
  version: 1.0
"""


def write_tasks(
    folder: Path,
    tasks: Iterable[Task],
    lengths: Sequence[int],
    trials: int,
    seed: int,
    counter: TokenCounter,
    texts: TextLibrary,
) -> list[str]:
    """Writes a task of the harness for each task and length, and returns their names.

    Use them with `lm-eval --include_path FOLDER --tasks NAME --apply_chat_template`.

    Raises:
        SettingError: a task measures loss or evidence, which the harness does not hand on.
    """
    names = []
    for task in tasks:
        if task.score_losses is not None or task.score_evidence is not None:
            what = "losses" if task.score_losses is not None else "evidence"
            raise SettingError(f"task {task.name} measures {what}, which lm-evaluation-harness does not hand on")
        for length in lengths:
            name = f"mgam_{task.name}_{length}"
            data = (folder / f"{name}.jsonl").absolute()
            requests = [Request(task.name, length, seed, index, counter, texts) for index in range(trials)]
            lines = [json.dumps(_record(task.sample(request)), ensure_ascii=False) for request in requests]
            replace_file(data, "\n".join(lines) + "\n")
            replace_file(folder / f"{name}.yaml", YAML.format(name=name, data=data, limit=task.max_new_tokens))
            names.append(name)
    replace_file(folder / "mgam_score.py", SCRIPT)
    return names


def _record(sample: Sample) -> dict[str, Any]:
    prompt = BEFORE + sample.document + AFTER + sample.question.strip()
    return {"prompt": prompt, "gold": ", ".join(sample.answers), "sample": json.dumps(sample.to_json())}


def score(record: dict[str, Any], reply: str) -> float:
    """What mgam gives for a reply to a record that `write_tasks` wrote."""
    sample = Sample.from_json(json.loads(record["sample"]))
    return all_tasks()[sample.task].score(sample, reply.strip()).value

"""Samples on disk: made once, read back whole or made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path

from mgam.evaluation.paths import replace_file, samples_folder
from mgam.evaluation.registry import Task
from mgam.evaluation.sample import Request, Sample


@cache
def code_version() -> str:
    """A hash of the code and word lists that make samples: a changed generator never meets old samples."""
    package = resources.files("mgam.evaluation")
    folders = (package / "tasks", package / "data")
    names = ("haystack.py", "sample.py", "registry.py", "tags.py", "texts.py", "splits.py", "tokens.py")
    parts = [package / name for name in names]
    parts += [part for folder in folders for part in folder.iterdir() if part.is_file()]
    digest = hashlib.sha256()
    for part in sorted(parts, key=lambda one: one.name):
        if part.name.endswith((".py", ".txt", ".json", ".jsonl")):
            digest.update(part.read_bytes())
    return digest.hexdigest()[:12]


class SampleCache:
    """Builds samples, or reads those built before; `say` is told when a file was damaged and is built again."""

    def __init__(self, root: Path | None = None, say: Callable[[str], None] = lambda message: None) -> None:
        self.root = root if root is not None else samples_folder()
        self.say = say

    def path(self, task: Task, request: Request) -> Path:
        """One file for each request, tokenizer, text and version of the generators."""
        texts = request.texts
        sources = [f"{source}:{texts.version(source)}" for source in (texts.prose_source, task.needs) if source]
        versions = hashlib.sha256("|".join([code_version(), *sources]).encode()).hexdigest()[:12]
        return self.root / request.counter.name / versions / f"{request.id}.json"

    def get(self, task: Task, request: Request) -> Sample:
        """The sample of `request`, from disk if it is there and whole."""
        path = self.path(task, request)
        if path.is_file():
            try:
                return self._read(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.say(f"the cached sample {path} is damaged ({error}); it is built again")
        sample = task.sample(request)
        body = json.dumps(sample.to_json(), ensure_ascii=False, separators=(",", ":"))
        try:
            replace_file(path, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")
        except OSError as error:
            self.say(f"samples cannot be cached in {self.root} ({error}); they are built anew each time")
            self.get = lambda task, request: task.sample(request)  # type: ignore[method-assign]
        return sample

    @staticmethod
    def _read(path: Path) -> Sample:
        checksum, _, body = path.read_text(encoding="utf-8").partition("\n")
        body = body.removesuffix("\n")
        if hashlib.sha256(body.encode()).hexdigest() != checksum:
            raise ValueError("its checksum does not match")
        return Sample.from_json(json.loads(body))

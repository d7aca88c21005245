"""The list of tasks: found by name or by group, built, and scored."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mgam.errors import SettingError
from mgam.evaluation.metrics import Score
from mgam.evaluation.reader import Passage
from mgam.evaluation.sample import Draft, Request, Sample
from mgam.evaluation.tags import measure

Unit = Literal["percent", "nats"]


@dataclass(frozen=True)
class Task:
    """One kind of question, how it is made and how a reply is scored."""

    name: str
    summary: str  # one line for people
    paper: str  # where the task's form comes from
    groups: tuple[str, ...]
    max_new_tokens: int  # a reply is cut here before it is scored
    build: Callable[[Request], Draft]
    score: Callable[[Sample, str], Score]
    hits: bool = False  # every score is 0 or 1, so that a Wilson interval can be given
    needs: str = ""  # text source that must have been fetched
    unit: Unit = "percent"  # "nats": mean loss per token, lower is better
    score_evidence: Callable[[Sample, Sequence[Passage]], Score] | None = None  # where evidence is the headline
    score_losses: Callable[[Sample, Sequence[float]], Score] | None = None  # where the loss of the document is

    def sample(self, request: Request) -> Sample:
        """Builds one sample: the generator's draft, counted and tagged."""
        draft = self.build(request)
        tokens = request.counter.count(draft.document)
        counted: dict[str, int] = {}

        def count_once(text: str) -> int:
            return counted.setdefault(text, request.counter.count(text))

        return Sample(
            id=request.id,
            task=self.name,
            length=request.length,
            document=draft.document,
            question=draft.question,
            answers=draft.answers,
            max_new_tokens=self.max_new_tokens,
            tokens=tokens,
            spans=draft.spans,
            tags=measure(draft.document, draft.question, draft.spans, draft.hops, count_once, tokens),
            details=dict(draft.details),
        )


_TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Adds a task; two tasks of one name are a mistake in the code."""
    if task.name in _TASKS:
        raise ValueError(f"two tasks are called {task.name!r}")
    _TASKS[task.name] = task
    return task


def all_tasks() -> dict[str, Task]:
    """Every task by name, in the order of their files."""
    from mgam.evaluation import tasks  # noqa: F401  (importing the package registers them)

    return dict(_TASKS)


def groups() -> dict[str, tuple[str, ...]]:
    """Names that stand for several tasks."""
    found: dict[str, list[str]] = {}
    for task in all_tasks().values():
        for group in ("all", *task.groups):
            found.setdefault(group, []).append(task.name)
    return {group: tuple(names) for group, names in found.items()}


def find_tasks(names: Iterable[str]) -> tuple[Task, ...]:
    """Tasks by name or group, each once; raises SettingError that names the near ones."""
    known, sets = all_tasks(), groups()
    found: dict[str, Task] = {}
    for name in names:
        if name not in known and name not in sets:
            raise SettingError(unknown("task", name, [*known, *sets]))
        found.update({member: known[member] for member in ((name,) if name in known else sets[name])})
    if not found:
        raise SettingError(f"no task was given; known groups are {', '.join(sets)}")
    return tuple(found.values())


def unknown(kind: str, given: str, known: Sequence[str]) -> str:
    """The message for a name that is not known, with those that look like it."""
    near = difflib.get_close_matches(given, known, n=4, cutoff=0.5) or [name for name in known if given in name][:4]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"
    return f"unknown {kind} {given!r}; {hint}"


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths as in `2k,4096,128k`: k is 1,024 tokens. Raises SettingError that says which one is wrong."""
    lengths: list[int] = []
    for part in text.replace(" ", "").split(","):
        if not part:
            continue
        number, factor = (part[:-1], 1024) if part[-1:] in "kK" else (part, 1)
        if not number.isascii() or not number.isdigit() or not 256 <= int(number) * factor <= 1 << 24:
            raise SettingError(
                f"{part!r} is not a length; give tokens from 256 to 16,777,216, for example 2k,8k,32768 "
                f"(usual: 2k, 4k, 8k, 16k, 32k, 64k, 128k)"
            )
        lengths.append(int(number) * factor)
    if not lengths:
        raise SettingError("no length was given; for example --lengths 2k,8k,32k")
    return tuple(dict.fromkeys(lengths))

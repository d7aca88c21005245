"""Runs tasks, lengths and methods, and writes each trial as it ends, so that a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mgam.errors import SettingError
from mgam.evaluation.cache import SampleCache
from mgam.evaluation.evidence import evidence_scores
from mgam.evaluation.metrics import Score
from mgam.evaluation.reader import BatchReader, DoesNotFitError, LossReader, Reader, Reading
from mgam.evaluation.registry import Task
from mgam.evaluation.results import ResultsFile, Row, Status, Trial, summarise
from mgam.evaluation.sample import Request, Sample
from mgam.evaluation.texts import TextLibrary
from mgam.evaluation.tokens import TokenCounter

Asked = tuple[Task, int]
"""A task, and the number of one of its trials."""
REPLY_KEPT = 500  # characters of a reply that the results keep


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    tasks: Sequence[Task]
    lengths: Sequence[int]
    trials: int
    seed: int = 0
    keep_out: tuple[int, int] = (0, 0)  # tokens at both ends of a document in which no needle may stand
    batch_size: int = 1
    rank: int = 0  # of this process among `world`, which share the trials
    world: int = 1

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise SettingError(f"--trials is {self.trials}; give 1 or more")
        if self.batch_size < 1:
            raise SettingError(f"--batch-size is {self.batch_size}; give 1 or more")

    @property
    def size(self) -> int:
        """Trials of one method that are this process's."""
        return len(self.tasks) * len(self.lengths) * len(range(self.rank, self.trials, self.world))

    def cells(self) -> Iterator[tuple[int, Task]]:
        """Short lengths first, so that the first figures come soon."""
        for length in sorted(self.lengths):
            for task in self.tasks:
                yield length, task


@dataclass(frozen=True)
class Bench:
    """What trials are made and kept with."""

    counter: TokenCounter
    texts: TextLibrary
    samples: SampleCache
    results: ResultsFile
    progress: Callable[[Trial], None] = lambda trial: None
    say: Callable[[str], None] = lambda message: None


def run(plan: Plan, reader: Reader, bench: Bench) -> None:
    """Reads every sample of the plan that the results do not hold yet."""
    too_long: dict[bool, tuple[int, str]] = {}
    for length, batch in _batches(plan, reader, bench):
        limit = too_long.get(batch[0][0].score_losses is not None)
        if limit is not None and length >= limit[0]:
            trials = [_unread(plan, task, reader, length, index, "does not fit", limit[1]) for task, index in batch]
        else:
            trials = _read(plan, length, batch, reader, bench)
        for trial, (task, _) in zip(trials, batch, strict=True):
            if trial.status == "does not fit":
                too_long.setdefault(task.score_losses is not None, (length, trial.reason))
            bench.results.add(trial)
            bench.progress(trial)


def _batches(plan: Plan, reader: Reader, bench: Bench) -> Iterator[tuple[int, list[Asked]]]:
    """Lengths and what is read at once there. Texts of several tasks share a batch, those with short replies first.

    Each reply is cut at its own task's limit when it is scored, so that it does not matter what else is in the batch.
    """
    for length in sorted(plan.lengths):
        shared: list[Asked] = []
        for task in plan.tasks:
            waiting: list[Asked] = [(task, index) for index in _waiting(plan, task, length, reader, bench)]
            if _shares(task, plan, reader):
                shared += waiting
            else:
                yield from ((length, batch) for batch in _cut(waiting, plan.batch_size))
        shared.sort(key=lambda asked: asked[0].max_new_tokens)
        yield from ((length, batch) for batch in _cut(shared, plan.batch_size))


def _cut(waiting: list[Asked], size: int) -> Iterator[list[Asked]]:
    for start in range(0, len(waiting), size):
        yield waiting[start : start + size]


def _shares(task: Task, plan: Plan, reader: Reader) -> bool:
    """Whether texts of this task are read together with others: a batch shows no evidence, and tells no losses."""
    alone = task.score_losses is not None or task.score_evidence is not None
    return plan.batch_size > 1 and not alone and isinstance(reader, BatchReader)


def _waiting(plan: Plan, task: Task, length: int, reader: Reader, bench: Bench) -> list[int]:
    """Numbers of the trials that are this process's and were not read yet."""
    waiting = []
    for index in range(plan.rank, plan.trials, plan.world):
        done = bench.results.trials.get((task.name, reader.method, reader.model, length, plan.seed, index))
        if done is not None and _stands(done, plan, task, reader, bench):
            bench.progress(done)
        else:
            waiting.append(index)
    return waiting


def _stands(done: Trial, plan: Plan, task: Task, reader: Reader, bench: Bench) -> bool:
    """Whether a trial of before is the one that is wanted: the same settings, and the same sample to the byte.

    What did not fit is tried again, since a later run may have more memory.
    """
    if done.status != "ok" or dict(done.settings) != _settings(plan, reader):
        return False
    try:
        return done.sample == bench.samples.get(task, _request(plan, task, done.length, done.trial, bench)).fingerprint
    except SettingError:  # it cannot be made here, which is told when it is read
        return False


def _request(plan: Plan, task: Task, length: int, index: int, bench: Bench) -> Request:
    return Request(task.name, length, plan.seed, index, bench.counter, bench.texts, plan.keep_out)


def _settings(plan: Plan, reader: Reader) -> dict[str, Any]:
    kept: dict[str, Any] = {} if plan.keep_out == (0, 0) else {"keep_out": list(plan.keep_out)}
    if plan.batch_size > 1:
        kept["batch_size"] = plan.batch_size  # seconds and memory are those of a batch
    return {**reader.settings, **kept}


def _read(plan: Plan, length: int, batch: Sequence[Asked], reader: Reader, bench: Bench) -> list[Trial]:
    def unread(status: Status, error: Exception) -> list[Trial]:
        return [_unread(plan, task, reader, length, index, status, str(error)) for task, index in batch]

    try:
        samples = [bench.samples.get(task, _request(plan, task, length, index, bench)) for task, index in batch]
    except SettingError as error:
        if len(batch) == 1:
            return unread("no sample", error)
        return [trial for one in batch for trial in _read(plan, length, [one], reader, bench)]  # which one it is
    readings: list[Reading] | None = None
    try:
        readings = _readings(plan, batch, samples, reader)
    except DoesNotFitError as error:
        if len(batch) == 1:
            return unread("does not fit", error)
    except SettingError as error:  # positions that the model does not have
        return unread("does not fit", error)
    if readings is None:  # told here, where what the error held is free again
        return _halved(plan, length, batch, reader, bench)
    settings = _settings(plan, reader)
    return [
        _trial(task, sample, reading, reader, plan.seed, index, bench, settings)
        for (task, index), sample, reading in zip(batch, samples, readings, strict=True)
    ]


def _halved(plan: Plan, length: int, batch: Sequence[Asked], reader: Reader, bench: Bench) -> list[Trial]:
    """Reads what did not fit at once in two parts; where one text alone does not fit, no more are tried."""
    half = len(batch) // 2
    trials = _read(plan, length, batch[:half], reader, bench)
    lost = next((trial for trial in trials if trial.status == "does not fit"), None)
    if lost is None:
        return trials + _read(plan, length, batch[half:], reader, bench)
    rest = batch[half:]
    return trials + [_unread(plan, task, reader, length, index, "does not fit", lost.reason) for task, index in rest]


def _readings(plan: Plan, batch: Sequence[Asked], samples: Sequence[Sample], reader: Reader) -> list[Reading]:
    task = batch[0][0]
    if task.score_losses is not None:
        if not isinstance(reader, LossReader):
            raise DoesNotFitError(f"{reader.method} cannot tell the loss of a text, which task {task.name} measures")
        return [reader.losses(sample.document) for sample in samples]
    if len(samples) > 1 and _shares(task, plan, reader) and isinstance(reader, BatchReader):
        documents, questions = [one.document for one in samples], [one.question for one in samples]
        return reader.read_batch(documents, questions, max(task.max_new_tokens for task, _ in batch))
    return [
        reader.read(sample.document, sample.question, task.max_new_tokens)
        for (task, _), sample in zip(batch, samples, strict=True)
    ]


def judge(task: Task, sample: Sample, reading: Reading, counter: TokenCounter) -> tuple[Score, str]:
    """The score of a reading, and the reply that was scored: cut at the task's token limit."""
    if task.score_losses is not None:
        return task.score_losses(sample, reading.losses), ""
    reply = counter.cut(reading.answer.strip(), task.max_new_tokens)
    score = task.score(sample, reply)
    if task.score_evidence is not None:
        shown = task.score_evidence(sample, reading.evidence)
        return Score(shown.value, {**shown.parts, "answer": score.value}), reply
    beside = evidence_scores(reading.evidence, sample.spans) if reading.evidence else {}
    return replace(score, parts={**score.parts, **beside}), reply


def _trial(
    task: Task,
    sample: Sample,
    reading: Reading,
    reader: Reader,
    seed: int,
    index: int,
    bench: Bench,
    settings: Mapping[str, Any],
) -> Trial:
    score, reply = judge(task, sample, reading, bench.counter)
    return Trial(
        task=task.name,
        method=reader.method,
        model=reader.model,
        length=sample.length,
        seed=seed,
        trial=index,
        score=score.value,
        parts=score.parts,
        seconds=reading.seconds,
        peak_memory_bytes=reading.peak_memory_bytes,
        entries_per_query=reading.entries_per_query,
        tokens=sample.tokens,
        depths=[round(depth, 5) for depth in sample.depths],
        diffusion=sample.tags.diffusion,
        scope=sample.tags.scope,
        quadrant=sample.tags.quadrant,
        hits=task.hits,
        unit=task.unit,
        reply=reply[:REPLY_KEPT],
        gold=[gold[:REPLY_KEPT] for gold in sample.answers],
        settings=settings,
        preprocess_seconds=reading.preprocess_seconds,
        sample=sample.fingerprint,
    )


def _unread(plan: Plan, task: Task, reader: Reader, length: int, index: int, status: Status, reason: str) -> Trial:
    return Trial(
        task=task.name,
        method=reader.method,
        model=reader.model,
        length=length,
        seed=plan.seed,
        trial=index,
        status=status,
        hits=task.hits,
        unit=task.unit,
        reason=reason,
        settings=_settings(plan, reader),
    )


def rows(plan: Plan, readers: Sequence[tuple[str, str]], results: ResultsFile) -> list[Row]:
    """The rows of this plan alone, whatever else the results file holds; `readers` are (method, model) pairs."""
    wanted = [
        (task.name, method, model, length, plan.seed, index)
        for length, task in plan.cells()
        for method, model in readers
        for index in range(plan.trials)
    ]
    return summarise(results.trials[key] for key in wanted if key in results.trials)

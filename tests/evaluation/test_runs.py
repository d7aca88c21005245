"""The runner: resuming, damage, what does not fit, means and intervals, and the page."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mgam.cli.app import app
from mgam.errors import DocumentError, SettingError
from mgam.evaluation.adapters import parse_method
from mgam.evaluation.cache import SampleCache
from mgam.evaluation.leaderboard import leaderboard
from mgam.evaluation.reader import DoesNotFitError, Reading
from mgam.evaluation.registry import all_tasks, find_tasks
from mgam.evaluation.report import write_report
from mgam.evaluation.report.figures import heat, points, reach
from mgam.evaluation.results import ResultsFile, Trial, summarise, wilson
from mgam.evaluation.runner import Bench, Plan, rows, run
from mgam.evaluation.session import Outcome, Session, evaluate_session

from .conftest import Maker
from .solvers import BY_PREFIX


class RuleReader:
    """Solves what is within its window, and holds documents up to its limit."""

    model = "rules"

    def __init__(self, method: str, window: int = 10**9, limit: int = 10**9) -> None:
        self.method, self.window, self.limit = method, window, limit
        self.reads = 0
        self.die_at = -1

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"method": self.method, "window": self.window}

    def read(self, document: str, question: str, max_new_tokens: int) -> Reading:
        if self.reads == self.die_at:
            raise KeyboardInterrupt
        if len(document) > self.limit:
            raise DoesNotFitError(f"{len(document)} characters are more than {self.limit}")
        self.reads += 1
        if len(document) > self.window:
            return Reading("", (), 1.0, 100, 10.0)
        prefix = "passkey" if "pass key" in question else "key_value"
        return Reading(BY_PREFIX[prefix](document, question), (), 1.0, 100, 10.0)

    def losses(self, document: str) -> Reading:
        return Reading("", (), 1.0, 100, 10.0, [2.0] * 100)


PLAN = Plan(find_tasks(["passkey", "key_value"]), [1024, 2048], 4)


@pytest.fixture
def bench(make: Maker, tmp_path: Path) -> Bench:
    said: list[str] = []
    samples = SampleCache(tmp_path / "samples", said.append)
    results = ResultsFile(tmp_path / "results.jsonl", said.append)
    return Bench(make.counter, make.library, samples, results, say=said.append)


def again(bench: Bench, said: list[str] | None = None) -> Bench:
    """The same files, opened anew."""
    results = ResultsFile(bench.results.path, (said if said is not None else []).append)
    return Bench(bench.counter, bench.texts, bench.samples, results)


def test_a_killed_run_goes_on_where_it_stopped(bench: Bench) -> None:
    reader = RuleReader("rule")
    reader.die_at = 7
    with pytest.raises(KeyboardInterrupt):
        run(PLAN, reader, bench)
    assert len(bench.results.trials) == 7
    later = RuleReader("rule")
    run(PLAN, later, again(bench))
    assert later.reads == 16 - 7
    finished = again(bench)
    assert [row.score for row in rows(PLAN, [("rule", "rules")], finished.results)] == [100.0] * 4
    run(PLAN, later, finished)
    assert later.reads == 16 - 7


def test_other_settings_are_not_taken_for_these(bench: Bench) -> None:
    run(PLAN, RuleReader("rule"), bench)
    other = RuleReader("rule", window=10)
    run(PLAN, other, again(bench))
    assert other.reads == 16


def test_other_samples_are_not_taken_for_these(bench: Bench) -> None:
    """A generator, a split or a text changed since: what it changed is read again, and nothing else."""
    run(PLAN, RuleReader("rule"), bench)
    path = bench.results.path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["sample"] for line in lines}) == 16
    lines[3]["sample"] = "of before"
    del lines[5]["sample"]  # results of before samples were told
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    later = RuleReader("rule")
    run(PLAN, later, again(bench))
    assert later.reads == 2


def test_a_damaged_results_file_is_said_and_its_good_lines_are_kept(bench: Bench) -> None:
    run(PLAN, RuleReader("rule"), bench)
    path = bench.results.path
    lines = path.read_bytes().splitlines(keepends=True)
    raw = b"".join([lines[0], b"{broken\n", *lines[1:], lines[-1][:40]])
    path.write_bytes(raw)
    said: list[str] = []
    opened = again(bench, said)
    assert len(said) == 1
    assert "lines 2, 18 are damaged" in said[0]
    assert len(opened.results.trials) == 16
    assert path.read_bytes() == raw
    opened.results.begin({"seed": 0})
    assert path.read_bytes() == raw[:-40] + b'{"run": {"seed": 0}}\n'
    said.clear()
    assert len(again(bench, said).results.trials) == 16
    assert "line 2 is damaged" in said[0]
    path.write_bytes(path.read_bytes()[:-1])  # an editor took the last line's end
    again(bench).results.begin({"seed": 1})
    assert [run["seed"] for run in again(bench).results.runs] == [0, 1]


@pytest.mark.parametrize(
    "raw", [b"a\nb\nc\n", b"no end", b'{"name": "x"}\n[[1]]\n', b'{"task": "milk"}\n', b"[" * 99_999]
)
def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "z.txt"
    path.write_bytes(raw)
    for words in (["report", str(path)], ["eval", "--tasks", "passkey", "--results", str(path)]):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, SettingError)
        assert "not a results file: line 1 is no JSON of a trial" in str(done.exception)
        assert path.read_bytes() == raw
    folder = CliRunner().invoke(app, ["eval", "--tasks", "passkey", "--results", str(tmp_path)])
    assert "is a folder" in str(folder.exception)


def test_a_results_file_may_be_empty_or_cut_in_its_first_line(tmp_path: Path) -> None:
    for raw in (b"", b'{"run": {"dev'):
        path = tmp_path / "results.jsonl"
        path.write_bytes(raw)
        ResultsFile(path).begin({"seed": 3})
        assert path.read_bytes() == b'{"run": {"seed": 3}}\n'


def test_a_damaged_sample_is_said_and_built_again(make: Maker, tmp_path: Path) -> None:
    said: list[str] = []
    cache, task, request = SampleCache(tmp_path, said.append), all_tasks()["passkey"], make.request("passkey")
    first = cache.get(task, request)
    path = cache.path(task, request)
    assert cache.get(task, request) == first
    assert not said
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert cache.get(task, request) == first
    assert len(said) == 1
    assert "damaged" in said[0]
    assert path.read_text() == whole


def test_a_cache_that_cannot_be_written_is_said_once(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    cache = SampleCache(tmp_path / "file" / "samples", said.append)
    for index in range(2):
        cache.get(all_tasks()["passkey"], make.request("passkey", index=index))
    assert len(said) == 1


def test_what_does_not_fit_is_said_and_others_go_on(bench: Bench) -> None:
    readers = [RuleReader("dense", limit=5500), RuleReader("rule")]
    for reader in readers:
        run(PLAN, reader, bench)
    assert readers[0].reads == 8  # the longer length is not tried again and again
    table = rows(PLAN, [(one.method, one.model) for one in readers], bench.results)
    missing = [row for row in table if row.status == "does not fit"]
    assert {(row.method, row.length) for row in missing} == {("dense", 2048)}
    assert all(row.score is None and "more than 5500" in row.reason for row in missing)
    assert all(row.score == 100 for row in table if row.method == "rule")


def test_a_sample_that_cannot_be_made_takes_no_other_with_it(bench: Bench) -> None:
    plan = Plan(find_tasks(["passkey", "needle_values"]), [256], 2, batch_size=4)
    run(plan, BatchRuleReader("rule"), bench)
    found = {(one.task, one.trial): one.status for one in bench.results.trials.values()}
    assert found == {
        ("passkey", 0): "ok", ("passkey", 1): "ok", ("needle_values", 0): "no sample", ("needle_values", 1): "no sample"
    }  # fmt: skip


def test_a_method_that_cannot_read_a_length_does_not_fit_it(bench: Bench) -> None:
    class Refusing(RuleReader):
        def read(self, document: str, question: str, max_new_tokens: int) -> Reading:
            raise SettingError("more entries than the model has positions for")

    run(Plan(find_tasks(["passkey"]), [1024], 2), Refusing("strided"), bench)
    assert [(one.status, one.reason) for one in bench.results.trials.values()] == [
        ("does not fit", "more entries than the model has positions for")
    ] * 2


def test_a_task_without_a_text_of_that_length_is_said(bench: Bench) -> None:
    plan = Plan(find_tasks(["loss_shipped", "passkey"]), [1024, 1 << 20], 1)
    small = Plan(plan.tasks[:1], plan.lengths, 1)
    run(small, RuleReader("dense"), bench)
    table = rows(small, [("dense", "rules")], bench.results)
    assert [(row.length, row.status) for row in table] == [(1024, "ok"), (1 << 20, "no sample")]
    assert table[0].unit == "nats"
    assert table[0].score == 2.0


def test_several_processes_share_the_trials(bench: Bench, tmp_path: Path) -> None:
    parts = []
    for rank in range(3):
        results = ResultsFile(tmp_path / "all.jsonl", write_to=tmp_path / f"all.jsonl.{rank}")
        plan = Plan(PLAN.tasks, PLAN.lengths, PLAN.trials, rank=rank, world=3)
        run(plan, RuleReader("rule"), Bench(bench.counter, bench.texts, bench.samples, results))
        assert len(results.trials) == plan.size
        parts.append(ResultsFile(tmp_path / f"all.jsonl.{rank}"))
    whole = ResultsFile(tmp_path / "all.jsonl")
    for part in parts:
        whole.take_in(part)
    assert len(ResultsFile(tmp_path / "all.jsonl").trials) == 16


class BatchRuleReader(RuleReader):
    """The same, several documents at a time."""

    def read_batch(self, documents: list[str], questions: list[str], max_new_tokens: int) -> list[Reading]:
        self.sizes = [*getattr(self, "sizes", []), len(documents)]
        return [self.read(document, question, 0) for document, question in zip(documents, questions, strict=True)]


def test_batches_give_the_same_trials(bench: Bench) -> None:
    reader = BatchRuleReader("rule")
    plan = Plan(PLAN.tasks, PLAN.lengths, PLAN.trials, batch_size=3)
    run(plan, reader, bench)
    assert reader.sizes == [3, 3, 2, 3, 3, 2]  # four trials of two tasks at each length
    assert len(bench.results.trials) == 16
    assert all(one.score == 1.0 and one.settings["batch_size"] == 3 for one in bench.results.trials.values())


def test_a_batch_that_does_not_fit_is_read_in_halves(bench: Bench) -> None:
    class Narrow(BatchRuleReader):
        def read_batch(self, documents: list[str], questions: list[str], max_new_tokens: int) -> list[Reading]:
            if len(documents) > 3:
                raise DoesNotFitError("out of memory")
            return super().read_batch(documents, questions, max_new_tokens)

    reader = Narrow("rule", limit=5500)
    run(Plan(PLAN.tasks, PLAN.lengths, PLAN.trials, batch_size=8), reader, bench)
    assert reader.sizes == [2, 2, 2, 2, 2]  # all eight shorter texts; two of the longer ones, then one, and no more
    found = {(one.task, one.length, one.trial): one.status for one in bench.results.trials.values()}
    assert len(found) == 16
    assert {length for (_, length, _), status in found.items() if status != "ok"} == {2048}


def trial(score: float, index: int, hits: bool = True, **more: Any) -> Trial:
    return Trial("t", "m", "x", 1024, 0, index, score=score, hits=hits, depths=[index / 10], **more)


def test_means_have_errors_and_hits_have_wilson_intervals() -> None:
    row = summarise([trial(float(index < 3), index, seconds=2.0, peak_memory_bytes=index) for index in range(4)])[0]
    assert row.score == 75
    assert row.stderr == pytest.approx(25.0)
    assert row.trials == 4
    assert (row.low, row.high) == pytest.approx((30.06, 95.44), abs=0.01)
    assert row.seconds == 2.0
    assert row.peak_memory_bytes == 3
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    one = summarise([trial(1.0, 0)])[0]
    assert one.stderr is None
    spread = summarise([trial(0.5, index, hits=False) for index in range(3)])[0]
    assert (spread.low, spread.high) == (50, 50)


def test_effective_length_is_the_longest_without_a_break() -> None:
    def at(method: str, length: int, score: float) -> Trial:
        return Trial("t", method, "x", length, 0, 0, score=score)

    scores = {"dense": (1.0, 0.9, 0.2, 0.9), "m": (0.9, 0.86, 0.85, 0.1), "n": (0.8, 1.0, 1.0, 1.0)}
    table = summarise(
        at(method, 1024 * 2**step, score) for method, found in scores.items() for step, score in enumerate(found)
    )
    assert {one.method: one.length for one in reach(table)} == {"dense": 2048, "m": 4096, "n": None}
    assert [point.score for point in points(table) if point.method == "dense"] == [100, 90, 20, 90]
    assert reach(summarise([at("dense", 1024, 0.0)])) == []


def test_a_shortfall_within_the_error_is_said() -> None:
    def at(method: str, length: int, *scores: float) -> list[Trial]:
        return [Trial("t", method, "x", length, 0, index, score=score) for index, score in enumerate(scores)]

    near, far = (0.9, 0.6, 0.9), (0.2, 0.1, 0.0)
    table = [
        *at("dense", 1024, 1.0, 1.0, 1.0),
        *at("dense", 2048, *far),
        *at("m", 1024, 1, 1, 1),
        *at("m", 2048, *near),
    ]
    found = {one.method: (one.length, one.likely) for one in reach(summarise(table))}
    assert found == {"dense": (1024, 1024), "m": (1024, 2048)}


def test_heat_is_by_depth() -> None:
    cells = heat([trial(float(index < 5), index) for index in range(10)], "m", ["t"], 5)
    assert [(cell.depth, cell.score, cell.trials) for cell in cells] == [
        (0, 100, 2), (1, 100, 2), (2, 50, 2), (3, 0, 2), (4, 0, 2),
    ]  # fmt: skip


class _Links(HTMLParser):
    """Tags that are open, and everything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_says_where_each_method_breaks(bench: Bench, tmp_path: Path) -> None:
    readers = [RuleReader("dense", window=4500, limit=9000), RuleReader("<rule>")]
    plan = Plan(find_tasks(["passkey", "key_value", "loss_shipped"]), [1024, 2048, 4096], 3)
    for reader in readers:
        run(plan, reader, bench)
    table = rows(plan, [(one.method, one.model) for one in readers], bench.results)
    conditions = {"model": "rules & more", "device": "a machine", "date": "today", "versions": {"mgam": "0"}}
    outcome = Outcome(table, list(bench.results.trials.values()), conditions, "mgam eval")
    page, data, sheet = write_report(tmp_path / "report.html", outcome)
    text = page.read_text()
    parser = _Links()
    parser.feed(text)
    assert not parser.open
    assert not parser.fetched
    assert "http://" not in text
    assert "https://" not in text
    assert "&lt;rule&gt; reads at least 4k tokens: 4 times as far as dense attention." in text
    assert "does not fit" in text
    assert "rules &amp; more" in text
    assert len(json.loads(data.read_text())["rows"]) == len(table)
    assert [line["task"] for line in csv.DictReader(sheet.open())] == [row.task for row in table]
    for field in ("task", "method", "model", "length", "trials", "score", "stderr", "seconds", "peak_memory_bytes"):
        assert field in table[0].to_json()
    assert "entries_per_query" in table[0].to_json()


def test_a_page_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    lost = summarise([Trial("t", "dense", "x", 1024, 0, 0, status="does not fit", reason="too long")])
    page = write_report(tmp_path / "report.html", Outcome(lost, [], {"model": "x"}))[0]
    assert "no effective length" in page.read_text()


def test_methods_carry_settings() -> None:
    assert parse_method("mgam") == ("mgam", {})
    label = "mgam:budget=512:levels=1/64/1024:mass=false:dense_until=none:positions=absolute:lookahead=none"
    assert parse_method(label)[1] == {
        "budget": 512, "levels": (1, 64, 1024), "mass": False, "dense_until": None, "positions": "absolute",
        "lookahead": "none",
    }  # fmt: skip
    with pytest.raises(SettingError, match="budget"):
        parse_method("mgam:budget")
    with pytest.raises(SettingError, match="dense is the model as it is"):
        parse_method("dense:adapter=lookup")


def test_plans_need_trials() -> None:
    with pytest.raises(SettingError, match="--trials"):
        Plan(PLAN.tasks, [1024], 0)


def test_the_leaderboard_is_made_from_reports(bench: Bench, tmp_path: Path) -> None:
    readers = [RuleReader("dense", window=4500), RuleReader("rule")]
    for reader in readers:
        run(PLAN, reader, bench)
    table = rows(PLAN, [(one.method, one.model) for one in readers], bench.results)
    conditions = {"model": "rules", "device": "a machine", "date": "2026-01-01", "commit": "abc"}
    folder = tmp_path / "results"
    write_report(folder / "rules.html", Outcome(table, [], conditions, "mgam eval --tasks passkey"))
    text = leaderboard(folder)
    assert "| dense | 100.0 ± 0.0 | 50.0 ± 0.0 | 1k |" in text
    assert "| rule | 100.0 ± 0.0 | 100.0 ± 0.0 | 2k |" in text
    assert "`mgam eval --tasks passkey`" in text
    (folder / "broken.json").write_text("{}")
    with pytest.raises(DocumentError, match=r"broken\.json"):
        leaderboard(folder)
    with pytest.raises(DocumentError, match="holds no reports"):
        leaderboard(tmp_path / "nothing")


def test_the_leaderboard_of_this_folder_is_named(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Plan(PLAN.tasks, [1024], 1), RuleReader("dense"), bench)
    write_report(tmp_path / "page.html", Outcome(summarise(bench.results.trials.values()), [], {}, ""))
    monkeypatch.chdir(tmp_path)
    text = leaderboard(Path("."))
    assert f"reports in `{tmp_path.name}/`" in text
    assert "; 1 trial of passkey" in text


def test_a_method_is_named_once_among_those_that_are_known() -> None:
    with pytest.raises(SettingError, match="known are: dense, ") as refused:
        evaluate_session(Session(["passkey"], "1k", ["zzz"]), Console())
    assert str(refused.value).count("dense") == 1


def test_one_page_of_several_runs(bench: Bench, tmp_path: Path) -> None:
    """Parts that were measured apart, and a run that was cut, come to one page by `mgam report`."""
    run(Plan(PLAN.tasks, [1024], 4), RuleReader("dense"), bench)
    other = Bench(bench.counter, bench.texts, bench.samples, ResultsFile(tmp_path / "other.jsonl"))
    bench.results.begin({"device": "one", "commit": "a", "command": "mgam eval --lengths 1k"})
    other.results.begin({"device": "another", "commit": "a", "command": "mgam eval --lengths 2k"})
    run(Plan(PLAN.tasks, [2048], 4), RuleReader("dense", window=10), other)
    page = tmp_path / "all.html"
    words = ["report", str(bench.results.path), str(other.results.path), "--to", str(page)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    whole = json.loads(page.with_suffix(".json").read_text())
    assert {(row["length"], row["score"]) for row in whole["rows"]} == {(1024, 100.0), (2048, 0.0)}
    assert whole["conditions"]["device"] == "one, another"
    assert whole["command"] == "mgam eval --lengths 1k; mgam eval --lengths 2k"
    missing = CliRunner().invoke(app, ["report", str(tmp_path / "none.jsonl"), "--to", str(page)])
    assert isinstance(missing.exception, SettingError)
    (tmp_path / "empty.jsonl").write_text("")
    empty = CliRunner().invoke(app, ["report", str(tmp_path / "empty.jsonl"), "--to", str(page)])
    assert "no trial is in there" in str(empty.exception)

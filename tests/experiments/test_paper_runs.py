"""Runs of the paper's table: models as declared, what a killed run comes to, and what the table says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from papertable import growth, plan, tables, train
from papertable.figures import apart, figure, margin, scores
from papertable.library import TASKS, Library
from papertable.measure import CUTS, baselines, evaluate, read_otherwise
from papertable.models import ABLATIONS, MODELS, REMEDIES, Reader, loss_of, parameters
from papertable.sample import Batch, collate
from papertable.sizes import SIZES, Size
from papertable.train import Run
from papertable.watch import reads_of
from typer.testing import CliRunner

SMOKE = SIZES["smoke"]
CHANGED = [*filter(None, ABLATIONS.values()), *REMEDIES.values()]
EVERY = [*((model, {}) for model in MODELS), *(("mgam", changes) for changes in CHANGED)]


def batch_of(library: Library, length: int = 512) -> Batch:
    return collate([library.sample(task, "train", length, 0, 0) for task in TASKS])


@pytest.mark.parametrize(("model", "changes"), EVERY, ids=lambda one: str(one))
def test_every_model_takes_a_step(library: Library, model: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    reader, batch = Reader(model, SMOKE, **changes), batch_of(library)
    optimizer = torch.optim.AdamW(reader.parameters(), 1e-2)
    before = loss_of(*reader(batch), batch)
    before.backward()
    for name, part in reader.named_parameters():
        assert part.grad is not None, name
        assert torch.isfinite(part.grad).all(), name
        assert part.grad.any() or "global_" in name, name  # of one layer, nobody reads what global queries found
    optimizer.step()
    assert loss_of(*reader(batch), batch).item() < before.item()


@pytest.mark.parametrize("model", MODELS)
def test_models_look_where_they_are_declared_to_look(library: Library, model: str) -> None:
    torch.manual_seed(0)
    reader, batch = Reader(model, SMOKE), batch_of(library)
    found: list[torch.Tensor] = []
    reader.layers[-1].register_forward_hook(lambda layer, given, out: found.append(out))
    reader(batch)
    place = 300
    batch.tokens[:, place:-40] = batch.tokens[:, place:-40].flip(1)
    reader(batch)
    early = (found[0][:, :place] - found[1][:, :place]).abs().amax()
    assert (early < 1e-6) == (model in ("gpt2", "mgam-causal"))
    assert (found[0][:, -1] - found[1][:, -1]).abs().amax() > 1e-5


@pytest.mark.parametrize("size", [SIZES["paper"], SIZES["tiny"]])
def test_models_are_equally_large(size: Size) -> None:
    with torch.device("meta"):
        counts = [parameters(Reader(model, size, **changes)) for model, changes in EVERY]
    assert max(counts) < 1.01 * min(counts)
    if size is SIZES["paper"]:
        assert 10e6 < min(counts) < 30e6


def test_entries_are_counted(library: Library) -> None:
    found = {}
    for model in MODELS:
        torch.manual_seed(0)
        found[model] = evaluate(Reader(model, SMOKE), library, ("hop",), "test", ((512, 2),), 1024, "cpu")["entries"]
    assert found["bert"]["512"] == {"tokens": 512.0}
    assert found["gpt2"]["512"] == {"tokens": 256.5}
    own = found["mgam"]["512"]
    assert 0 < own["tokens"] + own["level 1"] + own["level 2"] < 512


def test_a_taught_policy_learns_besides(library: Library) -> None:
    """The answer's loss and what is predicted stay as they are; the policy's gradient is no longer that of the gate."""
    batch, found = batch_of(library), []
    for taught in (0.0, 1.0):
        torch.manual_seed(0)
        reader = Reader("mgam", SMOKE, taught=taught)
        optimizer = torch.optim.SGD(reader.parameters(), 0.0)
        loss = train._one(Run("one", "mgam", 0.0, 0, SMOKE), reader, optimizer, batch, 0, "cpu")
        scores = reader.layers[0].attention.scores
        found.append((loss, reader.ask.weight.grad, scores.find.weight.grad))
        assert (reader.lesson is not None) == bool(taught)
    assert torch.equal(found[0][0], found[1][0])
    angles = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(*found, strict=True)][1:]
    assert angles[0] > 0.9999
    assert angles[1] < 0.99


def test_a_policy_may_learn_faster(library: Library) -> None:
    """Its parameters alone move further by one step of AdamW."""
    moved = {}
    for times in (1.0, 4.0):
        torch.manual_seed(0)
        reader = Reader("mgam", SMOKE, policy_rate=times)
        before = {name: part.detach().clone() for name, part in reader.named_parameters()}
        optimizer = torch.optim.AdamW(reader.groups(), 1e-3, weight_decay=0.0)
        train._one(Run("one", "mgam", 1e-3, 0, SMOKE), reader, optimizer, batch_of(library), 3, "cpu")
        moved[times] = {name: (part.detach() - before[name]).abs().max() for name, part in reader.named_parameters()}
    for name, far in moved[4.0].items():
        assert float(far / moved[1.0][name]) == pytest.approx(4.0 if ".scores." in name else 1.0, rel=1e-3)


def test_reading_otherwise_is_what_it_is_called(library: Library) -> None:
    """Everything as tokens is what a budget for all chunks reads; nothing far is seen through the window alone."""
    torch.manual_seed(0)
    reader, batch = Reader("mgam", SMOKE), batch_of(library)
    attention = reader.layers[0].attention
    before = reader(batch)[0]
    found = {}
    for name, how in CUTS.items():
        attention.seen_covers = []
        with read_otherwise(reader, **how):
            found[name] = reader(batch)[0]
        covers, attention.seen_covers = attention.seen_covers, None
        opened = [(cover.opened >= 0).sum(-1).max() for _, cover in covers]
        assert bool(covers) == (name != "everything as tokens")
        if name.startswith("window"):
            assert not any(opened)
            assert not any(cover.read for _, cover in covers)
        elif covers:
            assert max(opened) == attention.chooser.budget // attention.levels.chunk
    attention.chooser = replace(attention.chooser, budget=1 << 20, share=None)
    assert (reader(batch)[0] - found["everything as tokens"]).nan_to_num(0.0).abs().amax() < 1e-5
    attention.chooser = replace(attention.chooser, budget=64, share=0.95)
    assert torch.equal(reader(batch)[0], before)
    assert not any(torch.equal(one, before) for one in found.values())


def test_what_blocks_read_of_the_evidence_is_counted(library: Library) -> None:
    """Against the covers themselves, one pair after the other."""
    torch.manual_seed(0)
    size = replace(SMOKE, layers=2)
    reader = Reader("mgam", size)
    samples = [library.sample(task, "test", 1024, 0, number) for task in ("hop", "far") for number in range(3)]
    for model, held in (("mgam", False), ("mgam-causal", True)):
        reader = Reader(model, size)
        layers = [layer.attention for layer in reader.layers]
        for layer in layers:
            layer.seen_covers = []
        reader(collate(samples))
        found = reads_of(layers, samples)
        read: list[list[bool]] = []
        for row, sample in enumerate(samples):
            for gold in sample.ends[sample.gold].tolist():
                start = 1024 // 32 * 32 - 32
                if 32 <= gold < start - layers[0].side:
                    covers = [
                        torch.cat([cover.opened for _, cover in one.seen_covers], 2)[row, :, -1] for one in layers
                    ]
                    read += [[gold // 32 in one.tolist() for cover in covers for one in cover]]
        assert found["answer reads evidence, heads"] == pytest.approx(sum(map(sum, read)) / sum(map(len, read)))
        assert found["answer reads evidence, any head"] == pytest.approx(sum(map(any, read)) / len(read))
        assert ("question reads evidence, heads" not in found) == held  # a causal first block has nothing behind it
        assert 0 < found["between reads evidence, chance"] < 1


def test_a_killed_run_comes_to_the_same_result(library: Library, tmp_path: Path) -> None:
    run = Run("one", "mgam", 1e-3, 0, replace(SMOKE, keep_seconds=0.0))
    whole = train.train(run, library, tmp_path / "whole", "cpu")
    assert whole is not None
    assert train.train(run, library, tmp_path / "cut", "cpu", until=0.0) is None
    kept = json.loads((tmp_path / "cut/checkpoints/one/progress.json").read_text())
    assert 0 < kept["step"] < run.total
    (tmp_path / "cut/checkpoints/one/state.part").write_bytes(b"half a file")  # as a kill may leave it
    again = train.train(run, library, tmp_path / "cut", "cpu")
    assert again is not None
    assert again["losses"] == whole["losses"]
    assert again["test"] == whole["test"]
    assert not (tmp_path / "cut/checkpoints/one").exists()
    (tmp_path / "cut/runs/one.json").write_text(json.dumps({**again, "mark": 1}))
    assert train.train(run, library, tmp_path / "cut", "cpu")["mark"] == 1  # type: ignore[index]


def test_a_run_that_diverges_is_kept_and_counts_as_nothing(library: Library, tmp_path: Path) -> None:
    run = Run("bert-0", "bert", float("inf"), 0, SMOKE)
    found = train.train(run, library, tmp_path, "cpu")
    assert found is not None
    assert found["diverged"] == 2
    assert "test" not in found
    good = {"diverged": None, "test": {"scores": {"hop": {"512": {"accuracy": 50.0, "f1": 40.0}}}}}
    results = {"bert-0": found, "bert-1": good, "mgam-0": good, "mgam-1": good}
    assert scores(results, "bert", "f1") == [0.0, 40.0]
    assert margin(results, "mgam", "bert", "f1") == figure([40.0, 0.0])
    assert plan.dev_score(found) == -1.0


def test_what_was_to_be_reached_is_told_with_its_seeds() -> None:
    def run(f1: float) -> dict[str, Any]:
        return {"diverged": None, "test": {"scores": {"hop": {"512": {"accuracy": 50.0, "f1": f1}}}}}

    found = {"mgam-0": run(60.0), "mgam-1": run(60.0), "bert-0": run(60.5), "bert-1": run(60.7), "gpt2-0": run(50.0)}
    points = [
        {"model": model, "length": length, "step_peak_bytes": 10 + more, "step_ms": 5.0 - more}
        for model, more in (("mgam", 1), ("bert", 0), ("longformer", 0)) for length in (16384, 32768)
    ]  # fmt: skip
    (text,) = tables._verdict(found, points, [])
    assert "| F1 at most 1 point below the better full attention | yes (-0.6 ± 1.3, 2 seeds) |" in text
    assert "| F1 ahead of the Longformer-like model | not measured |" in text
    assert "peak memory of a step not above its at 16,384 tokens and above | no |" in text
    assert "a step faster than bert's at 16,384 tokens and above | yes |" in text
    assert "| nor above that of full attention (bert) | no |" in text
    assert text.count("not measured") == 3
    found["longformer-1"] = run(70.0)
    (text,) = tables._verdict(found, points[:2], points)
    assert "| no (-10.0, 1 seed) |" in text
    assert text.count("not measured") == 4
    assert "replayed as CUDA graphs | yes |" in text


def test_intervals_are_those_of_student() -> None:
    found = figure([70.0, 72.0, 74.0])
    assert found is not None
    assert found.mean == pytest.approx(72.0)
    assert found.half == pytest.approx(4.303 * 2 / 3**0.5)
    assert str(figure([1.25])) == "1.2"
    assert figure([]) is None


def test_runs_are_compared_on_the_same_samples() -> None:
    def tests(*samples: list[int]) -> list[dict[str, Any]]:
        return [{"samples": {"far": {"512": {"f1": one}, "1024": {"f1": [50, 50]}}}} for one in samples]

    found = apart(tests([0, 100, 100, 40], [0, 100, 100, 60]), tests([0, 0, 100, 50], [0, 100, 0, 50]), "f1")
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(12.5), 2)
    assert found.half == pytest.approx(1.96 * (2500 / 3 / 4) ** 0.5 / 2)
    assert apart(tests([1, 2]), [{}], "f1") is None
    assert apart(tests([1, 2]), tests([1, 2]), "accuracy") is None


def test_the_plan_tells_most_first_and_waits_for_rates(tmp_path: Path) -> None:
    size = SIZES["paper"]
    names = [run.name for run in plan.plan(size)]
    assert len(names) == len(set(names)) == 15 + 15 + 16 + 15 + 28
    assert sorted(names[15:20]) == sorted(f"{model}-0" for model in MODELS)
    able = [run.name for run, able in plan.ready(size, tmp_path, "*") if able]
    assert able == names[:15]
    (tmp_path / "runs").mkdir()
    for rate, value in zip(size.rates, (10.0, 30.0, 20.0), strict=True):
        cell = {"hop": {"1024": {"accuracy": value, "f1": value}}}
        done = {"diverged": None, "test": {"scores": cell}}
        (tmp_path / "runs" / f"tune-mgam-{rate:g}.json").write_text(json.dumps(done))
    ordered = [run.name for run, _ in plan.ready(size, tmp_path, "gpt2-1,bert-*,*-1")]
    assert ordered[:5] == ["gpt2-1", "bert-0", "bert-1", "bert-2", "mgam-1"]
    rates = {run.name: run.rate for run, able in plan.ready(size, tmp_path, "mgam-*") if able}
    assert rates["mgam-0"] == size.rates[1]
    assert "mgam-causal-0" not in rates
    (tmp_path / "runs" / f"tune-mgam-{size.rates[1]:g}.json").unlink()
    assert plan.chosen_rate("mgam", size, plan.results(tmp_path)) is None
    assert plan.chosen_rate("mgam", size, plan.results(tmp_path), missing=1) == size.rates[2]


def test_mixed_lengths_are_the_same_lengths() -> None:
    plain = Run("bert-0", "bert", 1e-3, 0, SIZES["paper"])
    mixed = replace(plain, mixed=True)
    lengths = [[run.length(step) for step in range(run.total)] for run in (plain, mixed)]
    assert lengths[0] != lengths[1]
    assert lengths[0][:350] == lengths[1][:350] == [512] * 350
    assert sorted(lengths[1]) == lengths[0] == sorted(lengths[0])
    assert set(lengths[1][-100:]) == set(lengths[0][350:])


def test_two_workers_do_not_make_one_run(tmp_path: Path) -> None:
    assert plan._claim(tmp_path, "one")
    assert not plan._claim(tmp_path, "one")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / "claims" / "one").write_text(gone.stdout)
    assert plan._claim(tmp_path, "one")
    assert (tmp_path / "claims" / "one").read_text() == str(os.getpid())


@pytest.mark.slow
def test_growth_is_measured_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = growth.measure("smoke", tmp_path, "cpu", 512, 512, ("mgam",))
    assert "failed" not in found, found
    assert found["step_ms"] > found["forward_ms"] > 0
    assert found["pyramid_ms"] > 0
    assert found["policy_ms"] > 0
    monkeypatch.setattr(
        growth,
        "_apart",
        lambda size, model, lengths, device, replayed: [{**found, "model": model, "length": lengths[0]}],
    )
    assert [line["length"] for line in growth.measure("smoke", tmp_path, "cpu", 512, 1024, ("mgam",))] == [1024]
    assert list(growth.measure("smoke", tmp_path, "cpu", 512, 1024, ("mgam",))) == []


def test_a_model_that_breaks_down_while_it_grows_is_told_once(tmp_path: Path) -> None:
    lines = list(growth.measure("smoke", tmp_path, "cuda:99", 512, 1024, ("bert",)))
    assert [(line["model"], line["length"]) for line in lines] == [("bert", 512)]
    assert "failed" in lines[0]
    assert list(growth.measure("smoke", tmp_path, "cuda:99", 512, 1024, ("bert",))) == []


def test_what_is_left_of_a_run_is_known_from_others_alike(tmp_path: Path) -> None:
    run = Run("bert-1", "bert", 1e-3, 1, SMOKE)
    assert plan._seconds_left(tmp_path, run) == 0.0
    (tmp_path / "runs").mkdir()

    def done(name: str, model: str, steps: int, seconds: float, commit: str | None = plan.COMMIT) -> None:
        told = {"model": model, "steps": steps, "tuning": name.startswith("tune")}
        found = {"run": told, "diverged": None, "seconds": seconds, "test_seconds": 3.0}
        found["conditions"] = {"commit": commit}
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(found))

    for known in (("tune-bert", "bert", 6, 60.0), ("mgam-0", "mgam", 6, 9.0), ("ablation", "bert", 3, 12.0)):
        done(*known)
    assert plan._seconds_left(tmp_path, run) == pytest.approx(plan.HOPE * 27)
    done("bert-0", "bert", 6, 12.0)
    assert plan._seconds_left(tmp_path, run) == pytest.approx(plan.HOPE * 15)
    (tmp_path / "checkpoints/bert-1").mkdir(parents=True)
    (tmp_path / "checkpoints/bert-1/progress.json").write_text('{"step": 3}')
    assert plan._seconds_left(tmp_path, run) == pytest.approx(plan.HOPE * 9)
    done("bert-2", "bert", 6, 90.0, "another")  # other code may take another time
    assert plan._seconds_left(tmp_path, run) == pytest.approx(plan.HOPE * 9)


def test_the_command_makes_runs_and_the_table(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = importlib.import_module("run")
    monkeypatch.setattr(command, "open_library", lambda data: library)
    call = CliRunner().invoke
    words = ["train", "--size", "smoke", "--out", str(tmp_path), "--device", "cpu"]
    for only in ("tune-bert*,bert-0", "tune-mgam-0*", "mgam-0", "far-as-it-is-0,far-random-policy-0"):
        made = call(command.app, [*words, "--only", only])
        assert made.exit_code == 0, made.output
    assert {"bert-0", "mgam-0", "mgam-causal-0"} - set(plan.results(tmp_path)) == {"mgam-causal-0"}
    refused = call(command.app, ["train", "--size", "tiny", "--out", str(tmp_path), "--device", "cpu"])
    assert refused.exit_code == 2
    assert "holds runs of smoke size" in " ".join(refused.output.replace("│", " ").split())
    monkeypatch.setattr(tables.plots, "draw", lambda *given: [])
    assert call(command.app, ["table", "--out", str(tmp_path)]).exit_code == 0
    text = (tmp_path / "table.md").read_text()
    assert "A check of the machinery at `smoke` size, not the table" in text
    assert "| bert | 1 |" in text
    assert "72.5 / 70.3" in text
    assert "| gpt2 | 0 | not measured |" in text
    assert json.loads((tmp_path / "baselines.json").read_text()) == baselines(library, TASKS, "test", SMOKE.test)
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in text.splitlines()}
    chance = lines["random policy"]
    assert chance[0] == "1"
    assert abs(int(chance[3]) - float(chance[1])) <= 0.5  # of one length alone
    assert " ± " in chance[4]
    assert chance[6].count(" / ") == 2
    assert text.count("| mgam | 1 | hop | 512 | accuracy |") == text.count("| far-as-it-is | 1 | far | 512 | F1 |") == 1
    assert lines["first hop alone"][1].startswith("100 / ")
    left = call(command.app, ["missing", "--size", "smoke", "--out", str(tmp_path), "--only", "mgam-0,far-bert*"])
    assert left.output.split() == ["far-bert-0", "far-bert-1"]


def test_what_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = importlib.import_module("run")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for data, missing in (("packages", "wikipedia"), ("published", "cnn_dailymail")):
        made = CliRunner().invoke(command.app, ["data", "--data", data])
        said = " ".join(made.output.replace("│", " ").split())
        assert made.exit_code == 2
        assert f"`mgam data fetch {missing}`" in said
        assert "everything runs offline with --data packages" in said


def test_pictures_are_drawn(tmp_path: Path) -> None:
    points = [{"model": "mgam", "length": length, "step_ms": 2.0, "step_peak_bytes": 1e9} for length in (512, 1024)]
    assert [path.name for path in tables.plots.draw(tmp_path, {}, points)] == ["time.svg", "memory.svg"]

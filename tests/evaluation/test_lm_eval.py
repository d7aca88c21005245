"""The model type of lm-evaluation-harness: the harness's own arithmetic, and dense where the budget covers all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")

from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgam.errors import SettingError
from mgam.integrations.lm_eval import MgamLM

WORDS = ["<s>", "</s>", *(f"w{number}" for number in range(60))]
TEXT = " ".join(f"w{number * 7 % 60}" for number in range(300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def model(folder: Path, **settings: Any) -> MgamLM:
    return MgamLM(str(folder), device="cpu", **settings)


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, argument, 0) for argument in arguments]


SHORT = " ".join(TEXT.split()[:50])
PAIRS = [("", "w3 w4"), (TEXT, " w9"), (SHORT[:8], " w1 w2 w3"), (SHORT, " w5"), (SHORT, " w6 w7")]


def test_log_likelihoods_are_dense_where_the_budget_covers_all(folder: Path) -> None:
    requests = ask("loglikelihood", *PAIRS)
    dense = model(folder, method="dense").loglikelihood(requests)
    full = model(folder, budget=1024, dense_until=0, window=64)
    close = [pytest.approx(one, rel=1e-5) for one in dense]
    assert full.loglikelihood(requests) == close
    assert full.loglikelihood(requests[::-1]) == close[::-1]
    assert model(folder, method="dense", batch_size=3).loglikelihood(requests) == close


def test_greedy_agrees_with_generation(folder: Path) -> None:
    reader = model(folder, budget=64, window=32, dense_until=0)
    said = reader.generate_until(ask("generate_until", (TEXT, {"until": [], "max_gen_toks": 1})))[0]
    assert reader.loglikelihood(ask("loglikelihood", (TEXT, f" {said}")))[0][1]


def test_rolling_is_the_sum_over_the_text(folder: Path) -> None:
    reader = model(folder, method="dense")
    whole = reader.loglikelihood_rolling(ask("loglikelihood_rolling", (SHORT,)))[0]
    ids = torch.tensor([[reader.prefix_token_id, *reader.tok_encode(SHORT)]])
    with torch.no_grad():
        logits = reader.model(ids).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, ids[0, 1:, None]).sum()
    assert whole == pytest.approx(float(expected), rel=1e-4)


def test_prompts_may_be_longer_than_the_trained_window(folder: Path) -> None:
    reader = model(folder, budget=64, window=32)
    assert reader.max_length == 1 << 20
    assert model(folder, method="dense").max_length == 512
    assert model(folder, method="dense", max_length=100).max_length == 100
    long = " ".join([TEXT] * 4)
    assert reader.loglikelihood(ask("loglikelihood", (long, " w1")))[0][0] < 0
    assert isinstance(reader.generate_until(ask("generate_until", (long, {"until": [], "max_gen_toks": 2})))[0], str)


def test_arguments_that_are_not_known_are_refused(folder: Path) -> None:
    with pytest.raises(SettingError, match="window"):
        model(folder, windwo=3)


def test_our_tasks_run_in_the_harness(folder: Path, tmp_path: Path) -> None:
    """The samples that mgam eval reads, by the harness from its command on: the replies are scored as ours are."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from mgam.evaluation.harness import score, write_tasks
    from mgam.evaluation.registry import find_tasks
    from mgam.evaluation.texts import TextLibrary
    from mgam.evaluation.tokens import TokenCounter

    reader = model(folder, budget=64, window=32)
    counter, texts = TokenCounter(reader.tokenizer), TextLibrary(tmp_path)
    names = write_tasks(tmp_path / "tasks", find_tasks(["passkey"]), [1024], 2, 0, counter, texts)
    assert names == ["mgam_passkey_1024"]
    record = json.loads((tmp_path / "tasks" / "mgam_passkey_1024.jsonl").read_text().splitlines()[0])
    assert score(record, f"It is {record['gold']}.") == 1.0
    assert score(record, "") == 0.0
    manager = TaskManager(include_path=str(tmp_path / "tasks"))
    found = simple_evaluate(reader, tasks=names, task_manager=manager, bootstrap_iters=0)
    assert found["results"]["mgam_passkey_1024"]["score,none"] == 0.0
    assert len(found["samples"]["mgam_passkey_1024"]) == 2
    with pytest.raises(SettingError, match="measures losses"):
        write_tasks(tmp_path, find_tasks(["loss_shipped"]), [1024], 1, 0, counter, texts)


def test_the_command_of_the_harness(folder: Path, tmp_path: Path) -> None:
    """`lm-eval --model mgam` on a task file, in a process of its own."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": SHORT, "answer": "w3"}) + "\n")
    (tmp_path / "own.yaml").write_text(
        "task: own_words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{text}}}}'\n"
        "doc_to_choice: ['w3', 'w4']\ndoc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
    )
    words = [sys.executable, "-m", "mgam.integrations.lm_eval", "--model", "mgam", "--tasks", "own_words"]
    words += ["--model_args", f"pretrained={folder},method=mgam,budget=64,window=32", "--device", "cpu"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "own_words" in done.stdout
    wrong = subprocess.run([*words[:8], "pretrained=nothing/here/at/all", *words[9:]], capture_output=True, text=True,
                           timeout=600, check=False)  # fmt: skip
    assert wrong.returncode != 0
    assert "no folder or file" in wrong.stderr

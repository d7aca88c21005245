"""The README's code runs as it stands; only the network is replaced, by the model that is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mgam.integrations.loading import load

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs(number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    loaded = load(None)

    def instead(kind: int) -> Any:
        def from_pretrained(name: str, **_: Any) -> Any:
            assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
            return loaded[kind]

        return staticmethod(from_pretrained)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", instead(0))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", instead(1))
    monkeypatch.chdir(ROOT)
    exec(compile(BLOCKS[number], "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 3


def test_there_is_code() -> None:
    assert BLOCKS


def test_every_link_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"

"""What `import mgam` costs and touches: little time, and nothing of torch or transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mgam

MOST = 2.0
"""Seconds that importing mgam may take beyond importing a model class of transformers."""

PROGRAM = """
import json, sys, time
begin = time.perf_counter()
from transformers import LlamaForCausalLM
import torch
model_class = time.perf_counter() - begin

from transformers import AttentionInterface, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers import cache_utils, masking_utils, modeling_utils
import transformers.models.llama.modeling_llama as llama

WATCHED = [
    torch, torch.nn.Module, torch.Tensor, torch.nn.functional, PreTrainedModel, GenerationMixin, LlamaForCausalLM,
    cache_utils, cache_utils.DynamicCache, masking_utils, modeling_utils, llama, llama.LlamaAttention,
]

def seen():
    names = [{name: id(value) for name, value in vars(one).items() if name != "__warningregistry__"} for one in WATCHED]
    registries = [dict(AttentionInterface._global_mapping), dict(masking_utils.AttentionMaskInterface._global_mapping)]
    return names, registries, torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()

before = seen()
begin = time.perf_counter()
import mgam
from mgam import Document, PyramidCache, Settings, applied, apply, reader, remove
import mgam.documents.asking, mgam.integrations.loading
ours = time.perf_counter() - begin
print(json.dumps({"model_class": model_class, "ours": ours, "untouched": before == seen()}))
"""


def measured() -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(Path(mgam.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_everything_is_quick_and_patches_nothing() -> None:
    found = measured()
    assert found["untouched"]
    if found["ours"] > MOST:  # another process may have had the cores
        found = min((measured() for _ in range(2)), key=lambda one: one["ours"])
    assert found["ours"] < MOST, found


def test_the_package_alone_imports_nothing_heavy() -> None:
    program = "import sys, mgam; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'typer')))"
    environment = {**os.environ, "PYTHONPATH": str(Path(mgam.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_public_names_are_listed() -> None:
    assert set(mgam.__all__) <= set(dir(mgam))
    assert all(getattr(mgam, name) is not None for name in mgam.__all__)

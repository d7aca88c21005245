"""Digests in figures: reading, asking and fetching, with memory, time and disk.

    python benchmarks/documents.py digest --tokens 256000 --memory 2GiB
    python benchmarks/documents.py ask --tokens 256000 --memory 2GiB
    python benchmarks/documents.py bits --tokens 16000
    python benchmarks/documents.py fetch --tokens 500000              on a GPU: host tier against moving whole layers

Each is a cell: done once, kept with its conditions in benchmarks/results/documents.<device>.json, and made anew with
--again. A digest that was stopped goes on. Digests are kept in --folder; `ask` and `bits` make the one they need.
The text is prose (--sources: the test split of fetched ones), repeated where it ends, with ten pass keys at ten depths;
every question asks for one of them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
NEEDLES = 10
AFTER = 384
"""Tokens of prose after a digest whose loss is taken."""
PLAIN = (
    "Who are the people in the text?", "Where does it take place?", "What happens first?", "How does it end?",
    "What is said about money?",
)  # fmt: skip
CITIES = ("Aran", "Bergen", "Cork", "Delft", "Evora", "Faro", "Ghent", "Hvar", "Izmir", "Jena")

app = typer.Typer(help=__doc__, no_args_is_help=True)

Tokens = Annotated[int, typer.Option(help="Tokens of the text, about.")]
Memory = Annotated[str | None, typer.Option(help="Bound of keys, values, summaries and search keys.")]
Model = Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")]
Device = Annotated[str, typer.Option()]
Folder = Annotated[Path, typer.Option(help="Where digests are kept.")]
Eight = Annotated[bool, typer.Option("--eight-bits", help="Pages in 8 bits.")]
Again = Annotated[bool, typer.Option("--again", help="Make the cell anew.")]
Budget = Annotated[int, typer.Option(help="Tokens that a query may read in full.")]
Sources = Annotated[str, typer.Option(help="Text sources, one after the other, with commas; see mgam data list.")]
Asking = Annotated[int | None, typer.Option(help="The same for questions and answers.", show_default="mgam's own")]
Adapter = Annotated[str | None, typer.Option(help="Low-rank adapters to read with: a folder, or a shipped name.")]
Reread = Annotated[int, typer.Option(help="Tokens of passages that a question reads a second time.")]
Host = Annotated[bool, typer.Option("--host", help="Pages wait in main memory, not on disk.")]


@dataclass(frozen=True)
class Cell:
    """What a digest is made of."""

    tokens: int
    memory: str | None
    model: str | None
    device: str
    folder: Path
    eight_bits: bool
    budget: int = 1024
    sources: str = ""
    host: bool = False
    question_budget: int | None = None
    adapter: str | None = None
    reread: int = 0

    @property
    def path(self) -> Path:
        """The digest's folder; the memory bound changes no byte of it."""
        name = f"{Path(self.model or 'default').stem}-{self.device}-{self.tokens}-{self.budget}"
        name += f"-{Path(self.adapter).name}" if self.adapter else ""
        return self.folder / f"{name}{'-8bit' if self.eight_bits else ''}.mgam"


@app.command()
def digest(
    tokens: Tokens = 32_000, memory: Memory = None, model: Model = None, device: Device = "auto",
    folder: Folder = Path("digests"), eight_bits: Eight = False, budget: Budget = 1024, sources: Sources = "",
    adapter: Adapter = None, again: Again = False,
) -> None:  # fmt: skip
    """Seconds, peak memory of the process and bytes on disk of digesting."""
    cell = Cell(tokens, memory, model, device, folder, eight_bits, budget, sources, adapter=adapter)
    _keep("digest", cell, again, lambda: _apart("digest", cell))


@app.command()
def ask(
    tokens: Tokens = 32_000, memory: Memory = None, model: Model = None, device: Device = "auto",
    folder: Folder = Path("digests"), eight_bits: Eight = False, budget: Budget = 1024, sources: Sources = "",
    host: Host = False, question_budget: Asking = None, adapter: Adapter = None, reread: Reread = 0,
    again: Again = False,
) -> None:  # fmt: skip
    """Opening (with cold and warm file caches), first token of 20 questions, hits by depth, peak memory."""
    asked = host, question_budget, adapter, reread
    cell = Cell(tokens, memory, model, device, folder, eight_bits, budget, sources, *asked)
    if not (cell.path / "manifest.json").exists():
        _keep("digest", cell, True, lambda: _apart("digest", cell))  # also where its figures are known already
    kind = "ask, host tier" if host else "ask"
    kind += f", question budget {question_budget}" if question_budget else ""
    kind += f", second look of {reread}" if reread else ""
    _keep(kind, cell, again, lambda: {"cold": _apart("ask cold", cell), "warm": _apart("ask", cell)})


@app.command()
def bits(
    tokens: Tokens = 16_000, memory: Memory = None, model: Model = None, device: Device = "auto",
    folder: Folder = Path("digests"), budget: Budget = 1024, again: Again = False,
) -> None:  # fmt: skip
    """What 8-bit pages change: bytes on disk, logits of questions, answers, loss of what follows the text."""
    cell = Cell(tokens, memory, model, device, folder, False, budget)
    _keep("bits", cell, again, lambda: _bits(cell))


@app.command()
def fetch(
    tokens: Tokens = 500_000, layers: int = 32, held: int = 8, query_chunks: int = 17, window: int = 640,
    steps: int = 20, again: Again = False,
) -> None:  # fmt: skip
    """Fetching for one token of an 8B-shaped model from pinned host memory, against moving whole layers; needs CUDA.

    `held` layers are kept in host memory and read in turn, so that a token still touches `layers` of them.
    """
    from fetching import pages_against_layers

    cell = Cell(tokens, None, f"{layers}x8x128", "cuda", Path(), False)
    _keep("fetch", cell, again, lambda: pages_against_layers(tokens, layers, held, query_chunks, window // 64, steps))


@app.command(hidden=True)
def run(kind: str, spec: str) -> None:
    """One part in a process of its own, so that its peak memory is its own."""
    values = json.loads(spec)
    cell = Cell(**{**values, "folder": Path(values["folder"])})
    make = {"digest": _digest, "ask": _ask, "ask cold": _ask_cold, "bits": _bits_of}[kind]
    print(json.dumps(make(cell)))


def _keep(kind: str, cell: Cell, again: bool, make: Callable[[], dict[str, Any]]) -> None:
    from mgam.evaluation.machine import conditions

    path = HERE / "results" / f"documents.{cell.device}.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    bound = cell.memory or "any memory"
    key = f"{kind}, {cell.path.stem}, {bound}"
    if key not in cells or again:
        print(f"{key} ...", file=sys.stderr, flush=True)
        cells[key] = {**make(), "conditions": conditions(_torch_device(cell.device))}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cells, indent=1) + "\n")
    print(json.dumps({key: cells[key]}, indent=1))


def _torch_device(device: str) -> str:
    import torch

    return "cuda" if device == "auto" and torch.cuda.is_available() else device


def _apart(kind: str, cell: Cell) -> dict[str, Any]:
    spec = json.dumps({**cell.__dict__, "folder": str(cell.folder)})
    paths = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, "run", kind, spec],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _load(cell: Cell) -> tuple[Any, Any]:
    import mgam
    from mgam.integrations.loading import load

    loaded = load(cell.model, device=cell.device)
    mgam.apply(loaded.model, budget=cell.budget, adapter=cell.adapter)
    return loaded.model, loaded.tokenizer


def _sentences(sources: str) -> Iterator[str]:
    """Running prose without end: as haystacks take it, or the test split of some sources, one after the other."""
    from mgam.evaluation.texts import TextLibrary

    library = TextLibrary()
    if not sources:
        yield from library.prose(random.Random(0))
    texts = [text for source in sources.split(",") for text in library.texts(source, "test")]
    while True:
        for text in texts:
            yield from library.sentences(text)


def _text(tokenizer: Any, tokens: int, sources: str) -> str:
    """Prose of about so many tokens, a pass key at each of ten depths."""
    sentences, _ = _taken(tokenizer, _sentences(sources), tokens)
    for number, city in reversed(list(enumerate(CITIES))):
        place = int((number + 0.5) / NEEDLES * len(sentences))
        sentences.insert(place, f"The pass key of {city} is {_pass_key(number)}.")
    return " ".join(sentences)


def _taken(tokenizer: Any, running: Iterator[str], tokens: int) -> tuple[list[str], Iterator[str]]:
    """Sentences of about so many tokens, and those that follow."""
    sentences: list[str] = []
    count = 0
    for sentence in running:
        sentences.append(sentence)
        count += len(tokenizer(sentence, add_special_tokens=False).input_ids)
        if count >= tokens:
            break
    return sentences, running


def _pass_key(number: int) -> int:
    return 10_000 + random.Random(number).randrange(90_000)


def _digest(cell: Cell) -> dict[str, Any]:
    from mgam.documents.digesting import digest as make
    from mgam.documents.sources import Source
    from mgam.documents.tiers import parse_memory
    from mgam.integrations.memory import peak_memory_bytes

    model, tokenizer = _load(cell)
    source = Source("prose", _text(tokenizer, cell.tokens, cell.sources))
    first: list[int] = []
    began = time.perf_counter()
    manifest = make(
        model, tokenizer, [source], cell.path, memory=parse_memory(cell.memory), eight_bits=cell.eight_bits, room=2048,
        on_progress=lambda done, total: first.append(done),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    rehearsed = _rehearsed(cell, model, tokenizer)
    size = sum(file.stat().st_size for file in cell.path.iterdir())
    read = manifest.tokens - (first[0] if first else manifest.tokens)
    return {
        "tokens": manifest.tokens,
        "tokens_read_in_this_run": read,
        "seconds": round(seconds, 1),
        "seconds_of_rehearsal": rehearsed,
        "tokens_per_second": round(read / seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "disk_bytes_per_token": round(size / manifest.tokens, 1),
        "resident_bytes_per_token": round(manifest.shape.resident_bytes_per_token, 1),
        "settings": manifest.settings.as_dict(),
    }


def _rehearsed(cell: Cell, model: Any, tokenizer: Any) -> float:
    from mgam.cli.digests import AGAIN
    from mgam.documents.document import Document
    from mgam.documents.rehearsing import rehearse

    began = time.perf_counter()
    document = Document.open(cell.path, model, tokenizer, memory=cell.memory)
    rehearse(document, AGAIN)
    document.close()
    return round(time.perf_counter() - began, 1)


def _ask_cold(cell: Cell) -> dict[str, Any]:
    """With the digest's files dropped from the system's cache."""
    for file in cell.path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return _ask(cell, questions=1)


def _ask(cell: Cell, questions: int = 2 * NEEDLES) -> dict[str, Any]:
    from mgam.documents.document import Document, Tier
    from mgam.integrations.memory import peak_memory_bytes

    model, tokenizer = _load(cell)
    began = time.perf_counter()
    tier: Tier = "host" if cell.host else "disk"
    document = Document.open(
        cell.path,
        model,
        tokenizer,
        memory=cell.memory,
        tier=tier,
        question_budget=cell.question_budget,
        reread=cell.reread,
    )
    opened = time.perf_counter() - began
    rows = []
    for trial in range(questions):
        number = trial % NEEDLES
        before = document.counts.fetched
        answer = document.ask(f"What is the pass key of {CITIES[number]}?", max_new_tokens=24)
        rows.append(
            {
                "depth": round((number + 0.5) / NEEDLES, 2),
                "hit": str(_pass_key(number)) in answer.answer,
                "answer": answer.answer,
                "seconds_to_first_token": answer.seconds["to the first token"],
                "seconds": answer.seconds["answering"],
                "pages_fetched": document.counts.fetched - before,
            }
        )
    return {
        "tokens": len(document.tokens),
        "seconds_to_open": round(opened, 2),
        "seconds_to_open_and_first_token": round(opened + rows[0]["seconds_to_first_token"], 2),
        "first_token_median": sorted(row["seconds_to_first_token"] for row in rows)[len(rows) // 2],
        "first_token_worst": max(row["seconds_to_first_token"] for row in rows),
        "hits": sum(row["hit"] for row in rows[:NEEDLES]),
        "of": len(rows[:NEEDLES]),
        "peak_memory_bytes": peak_memory_bytes(),
        "pool_pages": document.pool.slots,
        "page_bytes_in_memory": document.pool.keys[0].nbytes * 2,
        "questions": rows,
        "settings": document.manifest.settings.as_dict(),
    }


def _bits_of(cell: Cell) -> dict[str, Any]:
    """What a digest with pages of one kind gives; its logits are kept beside it."""
    import torch
    from safetensors.torch import save_file

    from mgam.documents.document import Document
    from mgam.documents.sources import Source
    from mgam.documents.tokens import Frame, encode

    model, tokenizer = _load(cell)
    source = Source("prose", _text(tokenizer, cell.tokens, cell.sources))
    _, rest = _taken(tokenizer, _sentences(cell.sources), cell.tokens)
    after = encode(tokenizer, " " + " ".join(_taken(tokenizer, rest, AFTER)[0]))
    document = Document.digest(
        model, tokenizer, [source], cell.path, memory=cell.memory, eight_bits=cell.eight_bits
    )  # fmt: skip
    questions = [f"What is the pass key of {city}?" for city in CITIES]
    frame = Frame.of(tokenizer)
    logits = [_after(document, model, frame.question(tokenizer, question)) for question in questions]
    answers = [document.ask(question, max_new_tokens=12).answer for question in (*questions, *PLAIN)]
    follows = _after(document, model, after)
    loss = torch.nn.functional.cross_entropy(follows[:-1], torch.tensor(after[1:]))
    save_file({"logits": torch.cat((*logits, follows))}, cell.path.with_suffix(".logits"))
    size = sum(file.stat().st_size for file in cell.path.iterdir())
    return {
        "hits": sum(str(_pass_key(number)) in answer for number, answer in enumerate(answers[:NEEDLES])),
        "of": NEEDLES,
        "disk_bytes_per_token": round(size / len(document.tokens), 1),
        "loss_of_what_follows": round(float(loss), 5),
        "tokens_that_follow": len(after) - 1,
        "number_format": str(model.dtype).removeprefix("torch."),
        "answers": answers,
    }


def _bits(cell: Cell) -> dict[str, Any]:
    """Both kinds of pages, and how far what they give differs; a kind that was measured is not measured again."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    logits = []
    for name, eight in (("full", False), ("eight", True)):
        part = Cell(**{**cell.__dict__, "eight_bits": eight})
        kept = part.path.with_suffix(".json")
        if not kept.exists():
            kept.write_text(json.dumps(_apart("bits", part)))
        found[name] = json.loads(kept.read_text())
        logits.append(load_file(part.path.with_suffix(".logits"))["logits"])
    full, small = logits
    answers = [found[name].pop("answers") for name in ("full", "eight")]
    found["tokens_compared"] = len(full)
    found["largest_logit_difference"] = round(float((full - small).abs().max()), 5)
    found["mean_kl_nats"] = _kl(full, small)
    found["same_best_token"] = float((full.argmax(-1) == small.argmax(-1)).float().mean())
    found["same_answers"] = sum(a == b for a, b in zip(*answers, strict=True))
    found["answers"] = len(answers[0])
    return found


def _after(document: Any, model: Any, ids: list[int]) -> Any:
    """Logits (n, V) of tokens right after a digest."""
    import torch

    cache, count = document.start(len(ids)), len(document.tokens)
    with torch.no_grad():
        places = torch.arange(count, count + len(ids), device=model.device)[None]
        asked = torch.tensor([ids], device=model.device)
        return model(asked, position_ids=places, past_key_values=cache, use_cache=True).logits[0].float().cpu()


def _kl(full: Any, small: Any) -> float:
    """Nats that a question's tokens lose, on average."""
    import torch

    return float(
        torch.nn.functional.kl_div(small.log_softmax(-1), full.log_softmax(-1), reduction="batchmean", log_target=True)
    )


if __name__ == "__main__":
    app()

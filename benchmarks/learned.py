"""Losses of a model that reads by a learned policy, on novels of the TEST split: JSON lines, conditions and figures.

    python benchmarks/learned.py MODEL POLICY OUT.jsonl inside far recall

`inside`: within the trained window, against dense and the training-free search, `lookahead=none`. `far`: the same
1,024 target tokens, preceded by ever longer texts. `recall`: a share of attention to keep, against a fixed budget of
the same mean cost, and how far budgets spread. `windows`: a wider window beside the same budget, against dense. `mass`:
on the TUNE split, what ways to read the rest cost at 8k and at 128k. `windows:tune`, as any part, is read of the TUNE
split. MODEL - is the default model.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mgam
from mgam.evaluation.machine import conditions
from mgam.integrations.loading import load
from mgam.policies.learned import Learned
from mgam.training.texts import Document, read_documents

TARGETS = 1024
FAR = (8192, 16384, 32768, 65536, 131072)


def stretches(documents: list[Document], tokens: int, count: int) -> list[Tensor]:
    """Ends of texts, evenly spread over the documents that are long enough: (tokens,) each."""
    long = [document.ids for document in documents if len(document.ids) >= tokens]
    found = []
    for number in range(count):
        ids = long[number % len(long)]
        last = len(ids) - (number // len(long)) * (len(ids) - tokens) // max(1, count // len(long))
        found.append(ids[last - tokens : last])
    return found


@torch.no_grad()
def loss(model: Any, ids: Tensor, targets: int) -> float:
    """Mean loss in nats of the last `targets` tokens."""
    ids = ids[None].to(model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -targets - 1 : -1]
    return float(cross_entropy(model.get_output_embeddings()(hidden).float(), ids[0, -targets:]))


def mean(values: list[float]) -> dict[str, float]:
    """Mean and its standard error."""
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"loss": round(statistics.fmean(values), 4), "error": round(spread, 4)}


@contextmanager
def budgets() -> Iterator[list[Tensor]]:
    """Collects what blocks open besides the sink, mean over KV heads, and what they could open: tokens, (2, N)."""
    found: list[Tensor] = []
    choose = Learned.choose

    def spying(self: Learned, voters: Any, blocks: Any, pyramid: Any, levels: Any) -> Any:
        cover = choose(self, voters, blocks, pyramid, levels)
        opened = (cover.opened > 0).sum(-1).float().mean(-1) * levels.chunk
        found.append(torch.stack((opened, (cover.window_start - levels.chunk).clamp_min(0).float())).cpu())
        return cover

    Learned.choose = spying  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Learned.choose = choose  # type: ignore[method-assign]


def inside(model: Any, policy: str, documents: list[Document], window: int) -> Iterator[dict[str, Any]]:
    """Positions from a quarter of the window on, as dense, scored and learned read them."""
    texts = stretches(documents, window, 8)
    for name, settings in (("dense", None), ("scored", {}), ("learned", {"policy": policy}),
                           ("learned, middle 256", {"policy": policy, "middle": 256})):  # fmt: skip
        mgam.remove(model)
        if settings is not None:
            mgam.apply(model, budget=1024, lookahead="none", dense_until=window // 4, **settings)
        began = time.perf_counter()
        found = [loss(model, ids, window - window // 4) for ids in texts]
        yield {"what": "inside", "how": name, "tokens": window, **mean(found), "losses": found,
               "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def far(model: Any, policy: str, documents: list[Document], window: int) -> Iterator[dict[str, Any]]:
    """The same targets, preceded by ever more."""
    texts = stretches(documents, max(FAR), 8)
    for tokens in FAR:
        for name, settings in (("learned", {"policy": policy}), ("scored", {}), ("dense", None)):
            if name == "dense" and tokens > window:
                continue
            mgam.remove(model)
            if settings is not None:
                mgam.apply(model, budget=1024, lookahead="none", **settings)
            found = [loss(model, ids[-tokens:], TARGETS) for ids in texts]
            yield {"what": "far", "how": name, "tokens": tokens, **mean(found), "losses": found}


def mass(model: Any, policy: str, documents: list[Document], window: int) -> Iterator[dict[str, Any]]:
    """The same targets at the shortest and the longest of `FAR`, by how the rest is read."""
    texts = stretches(documents, max(FAR), 8)
    rests: list[dict[str, Any]] = [{"mass": 0.5}, {"mass": 0.25}, {"mass": 0.0}, {"rest": "drop"}]
    learned = [{"policy": policy, **rest} for rest in (*rests, {"content": 0.0}, {"content": 0.0, "rest": "drop"})]
    for settings in (*learned, *rests):
        for tokens in (min(FAR), max(FAR)):
            mgam.remove(model)
            mgam.apply(model, budget=1024, lookahead="none", **settings)
            found = [loss(model, ids[-tokens:], TARGETS) for ids in texts]
            yield {"what": "mass", "how": settings, "tokens": tokens, **mean(found), "losses": found}


def recall(model: Any, policy: str, documents: list[Document], window: int) -> Iterator[dict[str, Any]]:
    """A share to keep, then the same mean budget for all blocks, heads and layers; dense before them."""
    texts = stretches(documents, window, 8)
    most = window // 2
    mgam.remove(model)
    losses = [loss(model, ids, window - window // 4) for ids in texts]
    yield {"what": "recall", "how": "dense", **mean(losses), "losses": losses}
    for share in (0.95, 0.9):
        mgam.apply(model, budget=most, recall=share, policy=policy, lookahead="none", dense_until=window // 4)
        with budgets() as found:
            losses = [loss(model, ids, window - window // 4) for ids in texts]
        every, there = torch.cat(found, 1)
        free = every[there >= most]  # blocks that could have opened all of the budget
        low, middle, high = (round(float(free.quantile(part)), 0) for part in (0.1, 0.5, 0.9))
        cost = float(every.mean())
        yield {"what": "recall", "how": f"recall={share}", "budget": most, "cost": round(cost, 1), **mean(losses),
               "tenth": low, "half": middle, "nine_tenths": high, "losses": losses}  # fmt: skip
        fixed = next(budget for budget in range(64, most + 64, 64) if float(there.clamp_max(budget).mean()) >= cost)
        mgam.apply(model, budget=fixed, policy=policy, lookahead="none", dense_until=window // 4)
        with budgets() as found:
            losses = [loss(model, ids, window - window // 4) for ids in texts]
        yield {"what": "recall", "how": f"fixed budget for recall={share}", "budget": fixed, **mean(losses),
               "cost": round(float(torch.cat(found, 1)[0].mean()), 1), "losses": losses}  # fmt: skip


def windows(model: Any, policy: str, documents: list[Document], window: int) -> Iterator[dict[str, Any]]:
    """As `inside`, dense and with two windows beside a budget of 1,024; what each costs over dense."""
    texts = stretches(documents, window, 8)
    mgam.remove(model)
    dense = [loss(model, ids, window - window // 4) for ids in texts]
    yield {"what": "windows", "how": "dense", "tokens": window, **mean(dense), "losses": dense}
    for wide in (512, 768):
        mgam.apply(model, budget=1024, window=wide, policy=policy, lookahead="none", dense_until=window // 4)
        found = [loss(model, ids, window - window // 4) for ids in texts]
        over = mean([one - other for one, other in zip(found, dense, strict=True)])
        yield {"what": "windows", "how": f"window={wide}", "tokens": window, **mean(found), "over": over,
               "percent": round(100 * (sum(found) / sum(dense) - 1), 3), "losses": found}  # fmt: skip


def main() -> None:
    """Runs what is named and writes lines as they come."""
    name, policy, out, *parts = sys.argv[1:]
    loaded = load(None if name == "-" else name)
    model: Any = loaded.model
    window = min(8192, model.config.max_position_embeddings)
    makers = {"inside": inside, "far": far, "mass": mass, "recall": recall, "windows": windows}
    with Path(out).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"run": {**conditions(str(model.device)), "dtype": str(model.dtype)}}) + "\n")
        for part in parts:
            what, _, asked = part.partition(":")
            split: Any = asked or ("tune" if what == "mass" else "test")
            documents = read_documents(["novels"], loaded.tokenizer, split)
            for line in makers[what](model, policy, documents, window):
                file.write(json.dumps({"model": model.name_or_path, "split": split, **line}) + "\n")
                file.flush()
                print({key: value for key, value in line.items() if key != "losses"}, flush=True)


if __name__ == "__main__":
    main()

"""What a share of each KV head's attention is worth to the model: measured on texts.

Heads differ by orders of magnitude in what the next token loses when they read less. Each in turn reads the sink and
the window alone while all others read in full, and the next tokens' divergence from those of full attention is divided
by the share of attention that the head lost. Divergence grows as the square of what is lost, so its root is taken.
Rounding alone sets two readings apart, in half precision as far as most heads do: what it does is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mgam.training.lessons import Sampling
from mgam.training.network import SearchNetwork
from mgam.training.teacher import Narrow, Seen, chunk_masses, watching

EVERY = 8
"""The next token of one position of so many is looked at."""
STRIDE = 64
"""One query of so many tells how much attention a head would lose."""
LEAST = 1e-3
"""Shares of attention below it count as this: what is divided by them says little."""
SURE = 0.05
"""Of what rounding does: a divergence that is less above it counts as this much."""


@torch.no_grad()
def measure_importance(
    model: Any, network: SearchNetwork, texts: Iterable[Tensor], sampling: Sampling, say: Callable[[str], None]
) -> dict[str, Any]:
    """Sets `importance` of every layer's search, one in the mean over all heads, and returns what was measured.

    A text (T,) is read once by full attention, and once more for each layer and KV head. Without texts nothing changes.
    """
    heads = {int(name): network.layer(int(name)).heads for name in network.layers}
    apart = {layer: torch.zeros(count) for layer, count in heads.items()}
    lost = {layer: torch.zeros(count) for layer, count in heads.items()}
    rounding = dict.fromkeys(heads, 0.0)
    count = 0
    for ids in texts:
        count += 1
        far = sampling.window + 8 * sampling.levels.chunk
        places = torch.arange(far, len(ids), STRIDE)

        def visit(seen: Seen, places: Tensor = places) -> None:
            lost[seen.layer] += _far(seen, places, sampling).cpu()

        asked = torch.arange(far, len(ids), EVERY, device=model.device)
        whole = _next(model, ids, asked, visit, None)

        def divergence(narrow: Narrow, ids: Tensor = ids, asked: Tensor = asked, whole: Tensor = whole) -> float:
            less = _next(model, ids, asked, lambda seen: None, narrow)
            return float((whole.exp() * (whole - less)).sum(-1).mean().clamp_min(0))

        for layer, number in heads.items():
            rounding[layer] += divergence(Narrow(layer, 0, sampling.levels.chunk, len(ids)))
            for head in range(number):
                apart[layer][head] += divergence(Narrow(layer, head, sampling.levels.chunk, sampling.window))
            say(f"measuring what heads matter: text {count}, layer {layer}")
    if not count:
        return {}
    sure = {layer: (apart[layer] - rounding[layer]).clamp_min(SURE * rounding[layer]) for layer in heads}
    worth = {layer: (sure[layer] / lost[layer].clamp_min(LEAST * count)).sqrt() for layer in heads}
    mean = torch.cat(list(worth.values())).mean().clamp_min(1e-9)
    told = {}
    for layer, found in worth.items():
        network.layer(layer).importance.copy_(found / mean)
        parts = {"divergence": apart[layer] / count, "lost": lost[layer] / count, "importance": found / mean}
        told[str(layer)] = {name: [round(one, 6) for one in part.tolist()] for name, part in parts.items()}
        told[str(layer)]["rounding"] = [round(rounding[layer] / count, 6)]
    return {"texts": count, "layers": told}


def _next(model: Any, ids: Tensor, asked: Tensor, visit: Callable[[Seen], None], narrow: Narrow | None) -> Tensor:
    """Log probabilities (P, V) of the tokens after positions `asked` (P,), in float32."""
    with watching(model, visit, narrow):
        ids = ids[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=asked).logits[0]
    return torch.log_softmax(logits.float(), -1)


def _far(seen: Seen, places: Tensor, sampling: Sampling) -> Tensor:
    """Mean share of attention (H,) that queries at `places` (P,) give to what lies between sink and window."""
    chunk = sampling.levels.chunk
    mass = chunk_masses(seen, places[None].to(seen.keys.device), chunk)[0]  # (H, G, P, C)
    number = torch.arange(mass.shape[-1])
    far = (number > 0) & ((number + 1) * chunk <= places[:, None] + 1 - sampling.window)
    return (mass * far.to(mass.device)).sum(-1).mean((1, 2))

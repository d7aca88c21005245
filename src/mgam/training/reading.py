"""Low-rank training of a model that reads by a learned policy: to look things up far back, and to read covers.

The model reads long texts through its covers, just as it does when it is used: a document in blocks that are decided by
what came before them, then questions in small blocks and answers token by token. Two losses: of the next token (of
answers, and of stretches of the text), through the covers; and of the search by content, which must rank the chunk that
holds an answer first. The second makes queries and keys of the model easier to search; the search itself stays.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mgam.errors import SettingError
from mgam.integrations.transformers import attention
from mgam.integrations.transformers.apply import Applied, applied_to, apply
from mgam.integrations.transformers.fitted import shape_of
from mgam.integrations.transformers.low_rank import FOLDER
from mgam.levels import Levels
from mgam.policies.files import FittedPolicy, resolve
from mgam.policies.learned import Learned, LearnedLayers
from mgam.policies.learned_search import best_logits
from mgam.schedule import Schedule, Span
from mgam.training.adapting import Adapting, Pupil, save_adapter, train, with_adapters
from mgam.training.fit import Say
from mgam.training.lookups import Asked, Lookup, LookupMaker
from mgam.training.network import LayerSearch, SearchNetwork
from mgam.training.runs import open_run, saying_why
from mgam.training.teacher import Seen, watching

NAME = "mgam_lesson"
ENOUGH = 0.25
"""Share of the search at which a chunk is opened anyway: more is not asked for."""


@dataclass(frozen=True)
class Reading(Adapting):
    """The dials of low-rank training through covers."""

    lengths: tuple[int, ...] = (6144, 12288, 24576)
    batch: int = 2
    questions: int = 8
    rate: float = 4e-4
    rank: int = 16
    search_weight: float = 0.2
    settings: tuple[tuple[str, Any], ...] = ()
    """Settings of `mgam.apply` to read with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_once != 1:
            raise SettingError("through covers texts are read one by one; leave --lora-at-once out")

    def many(self, tokens: int) -> int:
        """One: they are read one by one."""
        return 1


class CoverPupil(Pupil):
    """A model that reads through covers, with its adapters, and the searches of its layers."""

    dials: Reading

    def __init__(self, model: Any, network: SearchNetwork, reading: Reading, levels: Levels) -> None:
        super().__init__(model, reading)
        self.network, self.levels = network, levels
        self.window = int(applied_to(model).settings.window)

    def trained(self) -> dict[str, Tensor]:
        """Names and tensors of all that changes, and of what centres the searches."""
        return super().trained() | {f"network.{name}": one for name, one in self.network.state_dict().items()}

    def forward(self, lookups: Sequence[Lookup]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one lookup; what it says draws the text, and the third of the layers, whose losses count."""
        (lookup,) = lookups
        ids, document, asked = lookup.ids[None].to(self.model.device), lookup.document, lookup.asked
        applied = applied_to(self.model)
        self._renew(applied)
        applied.schedule = dialogue(document, asked, applied.settings.block, applied.settings.question_block)
        searched: list[Tensor] = []
        third = lookup.drawn % 3
        voters = _Voters.of(asked, self.levels, self.window, ids.device)

        def visit(layer: int, queries: Tensor, keys: Tensor) -> None:
            if voters is not None and layer % 3 == third:
                searched.append(evidence_loss(self.network.layer(layer), queries, keys, voters, self.levels))

        with shown(self.model, visit):
            hidden = self._hidden(ids)
        loss, parts = self._losses(hidden, ids, lookups)
        found = torch.stack(searched).mean() if searched else loss.new_zeros(())
        return loss + self.dials.search_weight * found, {**parts, "search": found.detach()}

    @torch.no_grad()
    def _renew(self, applied: Applied) -> None:
        """Makes layers read by the searches as they are now."""
        there = applied.make_policy(1.0)
        assert isinstance(there, LearnedLayers)
        policies = {
            layer: Learned(self.network.layer(layer).weights("lesson"), **_dials(policy))
            for layer, policy in there.layers.items()
        }
        applied._readings.clear()
        applied.make_policy = lambda scale: LearnedLayers(policies)  # type: ignore[method-assign]


def dialogue(document: int, asked: tuple[Asked, ...], block: int, question_block: int) -> Schedule:
    """The schedule of a lookup: what is read as when the model is used.

    The text is read with `lookahead="none"`, since its loss counts; questions, which are given, in small blocks whose
    queries all vote; answers token by token.
    """
    spans = [Span(document, block)]
    for one in asked:
        spans += [Span(one.answer[0], question_block, "block"), Span(one.answer[1], 1)]
    return Schedule((*spans, Span(None, 1)))


def _dials(policy: Learned) -> dict[str, Any]:
    return {name: value for name, value in vars(policy).items() if name != "weights"}


@dataclass(frozen=True)
class _Voters:
    """All positions that look something up, and what they look for.

    Shapes (P voters, Q questions): place (P,), visible (P,) chunks before each one's window, evidence (P, 2) first and
    last chunk, question (P,) which question it belongs to, answering (P,) whether it stands at or after the answer's
    beginning.
    """

    place: Tensor
    visible: Tensor
    evidence: Tensor
    question: Tensor
    answering: Tensor
    questions: int

    @classmethod
    def of(cls, asked: tuple[Asked, ...], levels: Levels, window: int, device: torch.device) -> _Voters | None:
        """None when every answer stands in a window or in the sink."""
        rows = []
        number = 0
        for one in asked:
            first, last = one.evidence[0] // levels.chunk, (one.evidence[1] - 1) // levels.chunk
            visible = max(0, one.question[0] - window + 1) // levels.chunk
            if first < 1 or last >= visible:
                continue
            for place in range(one.question[0], one.answer[1] - 1):
                rows.append((place, visible, first, last, number, int(place >= one.question[1] - 1)))
            number += 1
        if not rows:
            return None
        table = torch.tensor(rows, device=device).T
        return cls(table[0], table[1], table[2:4].T, table[4], table[5].bool(), number)


def evidence_loss(search: LayerSearch, queries: Tensor, keys: Tensor, voters: _Voters, levels: Levels) -> Tensor:
    """How far the search of a layer is from ranking what is asked for first.

    Shapes: queries (1, H*G, T, D), keys (1, H, T, D), before rotation. Each voter of an answer decides for itself;
    those of a question decide together. Distance plays no part: what is asked for stands anywhere.
    """
    weights = search.weights("lesson")
    asked = weights.look(queries[:, :, voters.place])[0]  # (H, G, P, r)
    chunks = keys.shape[2] // levels.chunk
    fine = keys[0, :, : chunks * levels.chunk].unflatten(1, (chunks, -1, levels.search)).mean(3)
    short = weights.keys(fine.transpose(1, 2))  # (H, S, C, r)
    heads, slots, count, _ = asked.shape
    logits = best_logits(asked.flatten(1, 2), short, chunks).view(heads, slots, count, chunks)
    number = torch.arange(chunks, device=logits.device)
    far = (number >= 1) & (number < voters.visible[:, None])  # (P, C)
    there = (number >= voters.evidence[:, :1]) & (number <= voters.evidence[:, 1:])
    alone = torch.softmax(logits.masked_fill(~far, -torch.inf), -1).mean(1)  # (H, P, C)
    right = (alone * there).sum(-1)
    single = -(right.clamp(1e-6, ENOUGH) / ENOUGH).log()
    single = (single * voters.answering).sum(-1) / voters.answering.sum().clamp_min(1)
    seen = number < (voters.place // levels.chunk)[:, None]
    shares = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).masked_fill(~far, 0.0).mean(1)
    shares = shares * ~voters.answering[:, None]
    index = voters.question[None, :, None].expand_as(shares)
    together = shares.new_zeros(heads, voters.questions, chunks).scatter_add(1, index, shares)
    hit = there.new_zeros(voters.questions, chunks)
    hit[voters.question] = there
    share = (together * hit).sum(-1) / together.sum(-1).clamp_min(1e-9)
    return single.mean() - (share.clamp(1e-6, ENOUGH) / ENOUGH).log().mean()


@contextmanager
def shown(model: Any, visit: Any) -> Iterator[None]:
    """While it lasts, layers that read through covers show their queries and keys, before rotation, to `visit`."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, attention.mask)
    before = []
    for index, layer in applied_to(model).layers.items():
        module: Any = layer
        before.append((module, module.config))
        module.config = copy.copy(module.config)
        module.config._attn_implementation = NAME
        module._mgam_visit = (index, visit)
    try:
        yield
    finally:
        for module, config in before:
            module.config = config
            del module._mgam_visit


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    index, visit = module._mgam_visit  # type: ignore[misc]
    visit(index, query, key)
    return attention.attention(module, query, key, value, *args, **kwargs)


def fit_reading(
    model: Any,
    policy: str | Path,
    maker: LookupMaker,
    folder: str | Path,
    reading: Reading | None = None,
    *,
    say: Say = print,
) -> FittedPolicy:
    """Trains an adapter, and a policy further, so that the model looks things up in texts longer than its window.

    Args:
        model: a transformers decoder, on its device; LoRA layers of PEFT are put into it.
        policy: the folder of a policy that was fitted to it.
        folder: where the trained policy and its adapter (`lora/`) go.

    Raises:
        SettingError: the policy is of another model; a run of other dials is there.
        FittingError: the loss is no number any more.
    """
    reading = reading or Reading()
    place = Path(folder)
    start = FittedPolicy.load(resolve(policy))
    start.check(shape_of(model), start.search)
    run = {"dials": asdict(reading), "policy": _name(start), **maker.described}
    open_run(place, run, True, model.device)
    torch.manual_seed(reading.seed)
    shapes = {int(layer): sizes for layer, sizes in start.model.layers.items()}
    reach = next(iter(start.layers.values())).prior.shape[1]
    network = SearchNetwork(shapes, start.width, start.slots, reach)
    network.to(model.device).requires_grad_(False)
    example = maker.make(0, min(reading.lengths), reading.questions)

    def visit(seen: Seen) -> None:
        layer = network.layer(seen.layer)
        layer.measure(seen.queries[0, :, ::4], seen.keys[0, :, ::4])
        layer.adopt(start.layers[seen.layer])

    with watching(model, visit), torch.no_grad():
        model.get_decoder()(input_ids=example.ids[None].to(model.device), use_cache=False)
    tuned = with_adapters(model, reading.rank)
    settings = {**dict(reading.settings), "policy": str(policy), "lookahead": "none"}
    apply(tuned, **settings)
    levels = applied_to(tuned).settings.pyramid_levels
    began = time.perf_counter()
    trainer = train(CoverPupil(tuned, network, reading, levels), maker, place, model.device, say)
    notes = {
        **start.notes, "reading": json.loads(json.dumps(asdict(reading), default=str)),
        "reading_steps": trainer.state.global_step, "reading_seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    fitted = FittedPolicy(
        start.model, start.width, start.slots, start.search, network.exported(), start.marks, start.defaults, notes
    )
    if trainer.is_world_process_zero():
        with saying_why(place, reading.rate):
            fitted.save(place)
            save_adapter(tuned, place / FOLDER)
    return fitted


def _name(policy: FittedPolicy) -> str:
    """What tells a policy from others: a hash of its weights."""
    return next(iter(policy.layers.values())).name.split(".")[0]

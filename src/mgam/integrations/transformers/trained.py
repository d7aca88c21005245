"""Modules of `mgam.nn` inside transformers' models, by configuration: decoders like Llama and encoders like BERT."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import mgam.nn as modules
from mgam import methods
from mgam.errors import ModelFileError, SettingError, UnsupportedModelError
from mgam.integrations.transformers.apply import remove
from mgam.integrations.transformers.models import Attention, Turn, architecture, attention_layers
from mgam.integrations.transformers.rows_layer import ColumnsLayer
from mgam.nn import SelfAttention, State
from mgam.positions import Rotary

NAME = "mgam-trained"
"""The attention implementation's name in transformers."""
FIELD = "mgam_attention"
"""Where a model's configuration says which attention it was trained with."""
DECODER = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
ENCODER = {"query": "query", "key": "key", "value": "value"}


def train_with(model: Any, method: str | None = None, **options: Any) -> Any:
    """Puts a module of `mgam.nn` in the place of every attention of a model, in place, to be trained with any trainer.

    Projections stay as they are, and those that a method has besides begin as copies of them: a model that was trained
    with full attention begins there, as far as the method reads what full attention reads. Gates, compression and what
    is drawn at random begin anew; a seed gives every layer a draw of its own. Attention dropout is left out. The choice
    is written to the configuration, so that `save_pretrained` keeps it and `mgam.load_trained` finds it.

    Args:
        model: a decoder of transformers whose attention is like Llama's, or an encoder whose attention is like BERT's.
        method: a name from `mgam methods` that has a module; None takes what the configuration says.
        options: of the module, such as `group=16`; see `mgam.nn`.

    Raises:
        SettingError: the method has no module, or no form for this direction; or its options cannot work.
        UnsupportedModelError: attention that is not like Llama's or BERT's.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModelError(f"a {type(model).__name__} was given; a model of transformers is wanted")
    if method is None:
        chosen = dict(getattr(config, FIELD, None) or {})
        if not chosen:
            raise SettingError(f"no method was given, and the model's configuration has no {FIELD!r}")
        method, options = str(chosen.pop("method")), chosen | options
    declared, kind = methods.get(method), _module_of(method)
    if declared.kind and options.setdefault("kind", declared.kind) != declared.kind:
        raise SettingError(f"{method} is of kind {declared.kind!r}; for kind={options['kind']!r} name that method")
    _check_options(method, kind, options)
    remove(model)
    AttentionInterface.register(NAME, _never_called)
    AttentionMaskInterface.register(NAME, _mask)
    places = list(_attentions(model, method, kind, options))
    model.set_attn_implementation(NAME)
    for parent, name, made in places:
        setattr(parent, name, made)
    setattr(config, FIELD, {"method": method, **options})
    return model


def load_trained(folder: str | Path, kind: Any = AutoModelForCausalLM) -> Any:
    """A model that was saved after `train_with`.

    Args:
        kind: the class of transformers that makes it, such as AutoModelForMaskedLM.

    Raises:
        ModelFileError: nothing is there, it was not made by `train_with`, or weights are missing.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    files = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not files:
        raise ModelFileError(f"{path} holds no config.json and .safetensors; give a folder that save_pretrained wrote")
    config = AutoConfig.from_pretrained(path)
    if not getattr(config, FIELD, None):
        raise ModelFileError(f"{path} was not made by mgam.train_with; load it with {kind.__name__}.from_pretrained")
    model = train_with(kind.from_config(config, dtype=config.dtype or torch.float32))
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    missing, unknown = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unknown or set(missing) - tied:
        raise ModelFileError(
            f"the weights in {path} do not fit its configuration: {len(unknown)} are unknown and "
            f"{len(set(missing) - tied)} missing (for example {next(iter([*unknown, *missing]))})"
        )
    model.tie_weights()
    return model.eval()


def _module_of(method: str) -> type[SelfAttention]:
    declared = methods.get(method)
    if not declared.module:
        able = ", ".join(name for name in methods.names() if methods.get(name).module)
        raise SettingError(f"method {method!r} has no module to train; these have: {able}")
    return getattr(modules, declared.module)


def _check_options(method: str, kind: type[SelfAttention], options: dict[str, Any]) -> None:
    """Refuses what the module does not take, and what the model decides."""
    known = _options(kind)
    if unknown := sorted(set(options) - known):
        raise SettingError(f"{method} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")


def _options(kind: type[SelfAttention]) -> set[str]:
    """Settings of a module, less what the model decides."""
    return {
        name
        for base in kind.__mro__
        for name, one in inspect.signature(base.__init__).parameters.items()  # type: ignore[misc]
        if one.kind is one.KEYWORD_ONLY
    } - {"causal", "rotary"}


def _of_layer(kind: type[SelfAttention], options: dict[str, Any], layer: int) -> dict[str, Any]:
    """The settings of one layer: what is drawn by a seed is drawn for each."""
    return {**options, "seed": options.get("seed", 0) + layer} if "seed" in _options(kind) else options


def _check_direction(method: str, kind: type[SelfAttention], model: Any, causal: bool) -> None:
    def has(kind: Any) -> bool:
        return kind.CAUSAL if causal else kind.BIDIRECTIONAL

    if not has(kind):
        made = [methods.get(name) for name in methods.names() if methods.get(name).module]
        raise SettingError(
            f"{method} has no {'causal' if causal else 'bidirectional'} form, and {type(model).__name__} is "
            f"{'a decoder' if causal else 'an encoder'}; these have one: "
            f"{', '.join(one.name for one in made if has(getattr(modules, one.module)))}"
        )


def _attentions(
    model: Any, method: str, kind: type[SelfAttention], options: dict[str, Any]
) -> Iterator[tuple[nn.Module, str, Trained]]:
    """Where each attention stands, and what takes its place."""
    if hasattr(model, "get_decoder") and hasattr(getattr(model.get_decoder(), "layers", [None])[0], "self_attn"):
        _check_direction(method, kind, model, causal=True)
        yield from _of_a_decoder(model, kind, options)
        return
    found = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if {*ENCODER.values()} <= {part for part, _ in child.named_children()} and hasattr(
                child, "num_attention_heads"
            ):
                if getattr(child, "is_decoder", False):
                    raise UnsupportedModelError(
                        "an encoder's class that is set to be a decoder; use a Llama-like decoder"
                    )
                _check_direction(method, kind, model, causal=False)
                own = _of_layer(kind, options, found)
                found += 1
                made = kind(child.all_head_size, child.num_attention_heads, causal=False, rotary=False, **own)
                made.out = nn.Identity()  # type: ignore[assignment]  # the block's own output comes after it
                yield parent, name, Trained(_filled(made, child, ENCODER), 0)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention like Llama's (layers[i].self_attn with q_proj, k_proj, v_proj, "
            "o_proj) or BERT's (query, key and value beside one another)"
        )


def _of_a_decoder(
    model: Any, kind: type[SelfAttention], options: dict[str, Any]
) -> Iterator[tuple[nn.Module, str, Trained]]:
    decoder, config = model.get_decoder(), model.config
    row = architecture(config)
    shared: dict[str, Rotary | None] = {}
    for index, layer in attention_layers(decoder, config).items():
        there = layer.module
        parts = {name for name, _ in there.named_children()}
        heads, dim = int(config.num_attention_heads), int(getattr(there, "head_dim", 0))
        if isinstance(there, Trained):
            raise UnsupportedModelError("this model was given modules already; load it again")
        if parts != {*DECODER.values()} or layer.window is not None:
            raise UnsupportedModelError(
                f"layer {index} of {type(model).__name__} has {', '.join(sorted(parts))}"
                f"{' and a sliding window' if layer.window else ''}; attention like Llama's has "
                f"{', '.join(DECODER.values())} and reads its whole past"
            )
        if heads * dim != int(config.hidden_size):
            raise UnsupportedModelError(
                f"{heads} heads of {dim} dimensions do not make up hidden states of {config.hidden_size}"
            )
        own = {} if int(config.num_key_value_heads) == heads else {"kv_heads": int(config.num_key_value_heads)}
        made = kind(int(config.hidden_size), heads, **own, **_of_layer(kind, options, index), causal=True, rotary=True)
        if layer.kind not in shared:
            turn = row.rotary(decoder, Attention(there, layer.kind))
            shared[layer.kind] = None if turn is None else Rotary(_tables(turn), row.trained_window(config))
        made.rotary = shared[layer.kind]
        made.scale = float(there.scaling)  # type: ignore[arg-type]
        yield decoder.layers[index], "self_attn", Trained(_filled(made, there, DECODER), index)


def _tables(turn: Turn) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def tables(places: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = turn(torch.empty(1, device=places.device, dtype=torch.float32), places[None])
        return cos[0], sin[0]

    return tables


def _filled(made: SelfAttention, there: nn.Module, names: dict[str, str]) -> SelfAttention:
    """The new module with the projections of the old one."""
    like = next(there.parameters())
    made.to(like.device, like.dtype)
    for own, old in names.items():
        if hasattr(made, own):
            setattr(made, own, getattr(there, old))
    made.copy_projections()
    return made


class Trained(nn.Module):
    """A module of `mgam.nn` with the face of an attention module of transformers."""

    def __init__(self, attention: SelfAttention, layer: int) -> None:
        super().__init__()
        self.attention = attention
        self.layer_idx = layer

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Outputs (B, T, width); attention weights are not kept."""
        if attention_mask is not None and attention_mask.dim() != 2:
            raise UnsupportedModelError(
                f"a mask of shape {tuple(attention_mask.shape)} was given; these modules take (B, T), True for tokens"
            )
        places = others.get("position_ids")
        if self.layer_idx or attention_mask is not None:
            places = None
        if places is not None and bool((places.diff(dim=1) != 1).any()):
            raise UnsupportedModelError("several texts in one row: these modules would mix them; pad them apart")
        if past_key_values is not None and self.attention.causal:
            return _state(past_key_values, self.layer_idx).read(self.attention, hidden_states, attention_mask), None
        return self.attention(hidden_states, attention_mask), None


class StateLayer(ColumnsLayer):
    """One layer of a cache: what a module keeps of all rows together, or of each alone where rows are padded."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.states: list[State] = []

    @property
    def rows(self) -> int:
        """Rows that are held; 0 before the first call."""
        if len(self.states) != 1:
            return len(self.states)
        return len(next(iter(self.states[0].kept.values())))

    def read(self, attention: SelfAttention, states: Tensor, mask: Tensor | None) -> Tensor:
        """Outputs (B, L, width) of new tokens; columns of padding give zeros."""
        length = states.shape[1]
        self.columns += length
        self.is_initialized = True
        if mask is None and len(self.states) <= 1:
            out, state = attention.step(states, self.states[0] if self.states else None)
            self.states = [state]
            return out
        live = torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask[:, -length:].bool()
        kept: list[State | None] = [*self._apart(states.shape[0])] if self.states else [None] * states.shape[0]
        out = torch.zeros_like(states)
        self.states = []
        for row, before in enumerate(kept):
            place = live[row].nonzero().flatten()
            got, after = attention.step(states[row : row + 1, place], before)
            out[row, place] = got[0]
            self.states.append(after)
        return out

    def _apart(self, rows: int) -> list[State]:
        if len(self.states) == rows:
            return self.states
        joint = self.states[0]
        return [
            State({name: part[row : row + 1] for name, part in joint.kept.items()}, joint.tokens) for row in range(rows)
        ]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps, repeats or reorders rows by index."""
        if len(self.states) > 1:
            self.states = [self.states[row] for row in indices.tolist()]
        elif self.states:
            joint = self.states[0]
            kept = {name: part.index_select(0, indices.to(part.device)) for name, part in joint.kept.items()}
            self.states = [State(kept, joint.tokens)]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first call makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused.

        Raises:
            UnsupportedModelError: this cache is read by the module that filled it, and by no other.
        """
        raise UnsupportedModelError("this cache was filled by a model with modules of mgam.nn; begin with a new one")

    def reset(self) -> None:
        """Begins anew."""
        self.columns, self.states = 0, []


def _state(cache: Any, index: int) -> StateLayer:
    """The layer at `index`, put in place of an empty one of transformers' own."""
    while len(cache.layers) <= index:
        cache.layers.append(StateLayer())
    there = cache.layers[index]
    if not isinstance(there, StateLayer):
        if there.is_initialized and there.get_seq_length():
            raise UnsupportedModelError("the cache holds keys and values of another attention; begin with a new one")
        cache.layers[index] = there = StateLayer()
    return there


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """A (B, T) mask, or none."""
    return flash_attention_mask(*args, **kwargs)


def _never_called(*args: Any, **kwargs: Any) -> Any:
    raise UnsupportedModelError(
        f"attention {NAME!r} stands for modules of mgam.nn, and this layer has none; call mgam.train_with(model, name)"
    )

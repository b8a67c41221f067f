"""How a checkpoint of a family is read: what its `config.json` means, and where each of its tensors goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcost.models.config import HeadConfig, LayerKind, ModelConfig, RopeScaling

Fields = Mapping[str, Any]
"""What a `config.json` holds."""
Tensors = Mapping[str, tuple[str, ...]]
"""Name of a tensor → the parameters that it holds, side by side along their last axis."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
"""Name of an activation in transformers → ours."""
_KINDS: Mapping[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}


TOKENS = ("cls", "distillation")
"""Names of an image's class tokens, for the `{token}` of a template."""


class UnsupportedModel(ValueError):
    """A checkpoint of a family, or with an option, that the transformer does not have."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What a class of a family has behind its blocks."""

    config: Callable[[Fields], HeadConfig]
    """The head that the fields of a `config.json` describe."""
    tensors: Tensors
    """Its tensors, whose matrices are all (out, in)."""
    tied: tuple[str, ...] = ()
    """Tensors that a checkpoint may hold although they are others again, where the model ties its embeddings."""
    unused: tuple[str, ...] = ()
    """Tensors that a checkpoint may hold although this head does not need them."""
    untied: Tensors = dataclasses.field(default_factory=dict)
    """Tensors that hold, where the model does not tie its embeddings, what others do where it does."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of one model type are read."""

    config: Callable[[Fields], ModelConfig]
    """The config that the fields of a `config.json` describe, but for its head."""
    tensors: Tensors
    """The tensors of all its models."""
    heads: Mapping[str, Head]
    """End of the name of a class, such as `ForCausalLM`, → its head; the first where none is named."""
    name: str
    """What the names of its classes start with."""
    stored: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]] = lambda config: {}
    """Tensor → the shape that checkpoints hold it in, where that is of more axes than a matrix has."""
    transposed: bool = True
    """Matrices of the blocks are (out, in), as torch's linear layers keep them; ours are (in, out)."""
    further: Callable[[ModelConfig], Tensors] = lambda config: {}
    """Tensors that depend on the config by their number, or by where they go."""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """End of a tensor's name in older checkpoints → its end in these."""

    def head_of(self, fields: Fields) -> Head:
        """The head of a checkpoint, by the class that its `config.json` names; UnsupportedModel if it is not ours."""
        named = fields.get("architectures") or [self.name + next(iter(self.heads))]
        if not (isinstance(named, list) and isinstance(named[0], str)):
            raise UnsupportedModel(f"architectures is {named!r}; it must list a class's name.")
        (architecture, *_) = named
        # Old checkpoints spell LLaMAForCausalLM.
        for end, head in self.heads.items():
            # Gemma 3's models of text alone say so.
            if architecture.lower() in (f"{self.name}{end}".lower(), f"{self.name}Text{end}".lower()):
                return head
        raise UnsupportedModel(f"The class {architecture!r} is not one of {self.name} and {', '.join(self.heads)}.")


def hidden_states(*unused: str) -> dict[str, Head]:
    """The class of a family that has no head, and the tensors that its checkpoints may hold beside."""
    return {"Model": Head(lambda fields: HeadConfig(embed=True), {}, unused=unused)}


# ---- Fields ----


def needed(fields: Fields, name: str) -> int:
    """A size that a config must have, at least 1."""
    if fields.get(name) is None:
        raise UnsupportedModel(f"The config lacks {name}, which a {fields.get('model_type')} model needs.")
    return positive(name, fields[name])


def positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise UnsupportedModel(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if value >= 2**31:
        raise UnsupportedModel(f"{name} is {value}, more than 2^31; write what the model has.")
    return value


def sizes(fields: Fields) -> dict[str, int]:
    """The sizes of the blocks by ModelConfig's names, from those that most families give them."""
    width, heads = needed(fields, "hidden_size"), needed(fields, "num_attention_heads")
    return {
        "width": width,
        "num_layers": needed(fields, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or width // heads,
        "mlp_width": needed(fields, "intermediate_size"),
    }


def plain_encoder(fields: Fields) -> dict[str, Any]:
    """The options by ModelConfig's names of encoders as the first ones were: LayerNorm, biases, learned positions."""
    return {
        **sizes(fields),
        "gated": False,
        "activation": activation(fields.get("hidden_act", "gelu")),
        "norm": "layer",
        "norm_epsilon": fields.get("layer_norm_eps", 1e-12),
        "position": "learned",
        "causal": False,
        "qkv_bias": fields.get("qkv_bias", True),
        "output_bias": True,
        "mlp_bias": True,
    }


def activation(name: str) -> str:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(f"The activation {name!r} is not one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def pattern(kinds: Sequence[str], window: int, layers: int) -> dict[str, Any]:
    """The shortest pattern that repeats to the kinds of all layers, and its window."""
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UnsupportedModel(f"layer_types is {kinds!r}; it must list one for each of {layers} layers.")
    unknown = sorted({str(kind) for kind in kinds} - set(_KINDS))
    if unknown:
        raise UnsupportedModel(f"Layers of the type {', '.join(unknown)} are not among {', '.join(_KINDS)}.")
    pattern = tuple(_KINDS[kind] for kind in shortest_pattern(kinds))
    return {"pattern": pattern, "window": window if "local" in pattern else 0}


def shortest_pattern(kinds: Sequence[str]) -> Sequence[str]:
    """The shortest start of a sequence that repeats to the whole of it."""
    period = next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
    return kinds[:period]


def rope_fields(fields: Fields, kind: str) -> Fields:
    """The rotary fields of a kind of layer, in transformers 5's form."""
    if "rope_parameters" in fields:
        found = fields["rope_parameters"] or {}
        return found.get(kind, found)
    old = fields.get("rope_scaling") or {}
    rest = {name: fields[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    return {"rope_type": old.get("type", "default"), **old, **rest}


def rope(found: Fields) -> tuple[float, RopeScaling, float]:
    theta, fraction = found.get("rope_theta", 10_000.0), found.get("partial_rotary_factor", 1.0)
    kind = found.get("rope_type", "default")
    if kind == "default":
        return theta, RopeScaling(), fraction
    if kind == "linear":
        return theta, RopeScaling("linear", found["factor"]), fraction
    if kind == "llama3":
        ramp = (found["low_freq_factor"], found["high_freq_factor"], found["original_max_position_embeddings"])
        return theta, RopeScaling("llama3", found["factor"], *ramp), fraction
    raise UnsupportedModel(f"The rope_type {kind!r} is not one of default, linear, llama3.")


def labels(fields: Fields) -> int:
    """Labels of a classifier; transformers takes two where none are named."""
    named = fields.get("id2label")
    if not named:
        return positive("num_labels", fields.get("num_labels", 2))
    if not isinstance(named, dict):
        raise UnsupportedModel(f"id2label is {named!r}; it must be an object, a name by number.")
    return len(named)


# ---- Tensors ----


def norm(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    """The tensors of a LayerNorm."""
    return {f"{theirs}.weight": (f"{ours}/scale",), f"{theirs}.bias": (f"{ours}/bias",)}


def linear(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    """The tensors of a linear layer."""
    return {f"{theirs}.weight": (f"{ours}/kernel",), f"{theirs}.bias": (f"{ours}/bias",)}

"""The closed form for weights of any kind: FLOPs of a training step from the shapes of a tree of weights alone.

What a transform saves follows from its kinds: what a token is multiplied with, and which of it gets a gradient. FLOPs
are operations (a multiply-add is two), without recomputation; elementwise work is left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from jaxcost import weights
from jaxcost.cost.closed_form import (
    Attention,
    answers_per_sequence,
    attention_flops_per_token,
    cross_attention_flops_per_token,
    frontend_rows,
)
from jaxcost.models import optional
from jaxcost.models.config import ModelConfig
from jaxcost.models.experts import KERNELS, capacity
from jaxcost.models.stacks import STACKS, resized
from jaxcost.models.transformer import output_matrix
from jaxcost.weights import Adapters, Dora, Frozen, Lora, LowRank, Observed, Scaled


@dataclasses.dataclass(frozen=True)
class Multiplied:
    """Entries of the matrices that each token is multiplied with."""

    entries: int = 0
    """All of them: 2 FLOPs each in the forward pass, and 2 for the gradient with respect to the token."""
    trained: int = 0
    """Those that get a gradient: 2 FLOPs more."""
    once: int = 0
    """FLOPs a step, whatever the number of tokens: the norms of DoRA."""

    def __add__(self, other: Multiplied) -> Multiplied:
        return Multiplied(self.entries + other.entries, self.trained + other.trained, self.once + other.once)


def training_step_flops(
    model: ModelConfig, params: weights.Params, batch: int, sequence_tokens: int, attention: Attention = "causal"
) -> int:
    """FLOPs of one training step: 2·(2·entries + trained) a token, attention three times, and what is made once.

    A stack costs its forward pass only, unless something in it or below it trains. Masked weights, and those that train
    quantised, are made dense first, so they cost what dense ones do; so does a quantised weight, whose products this
    does not tell apart by operand type. Virtual tokens are tokens of the layers, not of the unembedding. Experts with a
    capacity multiply as many rows of each sequence, full or not; those without one multiply the tokens sent to them
    with dense matrices, the making of which is left out. An encoder reads a source of model.source.max_length tokens
    for each sequence. Unrolled, a compiler drops the gradient of the lowest layer's inputs where nothing below it
    trains.

    What makes tokens of an image or of audio costs as much as for the shortest audio that gives so many, without the
    gradient of what nothing below it trains.

    Args:
      model: what the weights are of, whatever sizes they have left.
      params: arrays or ShapeDtypeStructs, in kinds.
      batch: sequences a step.
      sequence_tokens: tokens of a sequence, virtual ones left out.
      attention: convention for attention's FLOPs; a reference implementation computes `full`.
    """
    model = resized(model, params)
    prompt = optional.prompt_tokens(params)
    tokens, seen = sequence_tokens + prompt, sequence_tokens + prompt + optional.prefix_tokens(params)
    below = _trains({name: tree for name, tree in params.items() if name not in _ABOVE})
    total, learns = 0, False
    if model.encoder.num_layers:
        read, encoder = model.source.max_length, params["encoder"]
        embed = {"embed": params["embed"]} if model.source.of_tokens else {}
        under = _trains(embed | {name: tree for name, tree in encoder.items() if name not in _ABOVE})
        learns = _trains(embed | {"encoder": encoder})
        total += batch * _frontend_flops(model.source, encoder, read)
        total += _blocks(model.source, encoder, batch, read, read, under, attention)
        total += sum(_flops(one, batch * read, learns) for one in _of_sources(params))
    else:
        total += batch * _frontend_flops(model, params, sequence_tokens)
    total += _blocks(model, params, batch, tokens, seen, below, attention, learns)
    answered = batch * answers_per_sequence(model, sequence_tokens)
    return total + sum(_flops(multiplied(w), answered, True) for w in _of_the_head(model, params))


def _blocks(
    model: ModelConfig,
    params: weights.Params,
    batch: int,
    tokens: int,
    seen: int,
    below: bool,
    attention: Attention,
    learns: bool = False,
) -> int:
    """FLOPs of the stacks of a tree, but for the keys and values of a source.

    `below`: something under the stacks trains. `learns`: something trains in what reads the source.
    """
    total = 0
    for stack in filter(params.__contains__, STACKS):
        below |= _trains(params[stack])
        depth = jax.tree.leaves(params[stack])[0].shape[0]
        every, routed = _of_kernels(params[stack], model)
        own = dataclasses.replace(model, num_layers=depth)
        scores = attention_flops_per_token(own, seen, attention)
        for one, rows in ((every, tokens), (routed, _rows_of_an_expert(model, tokens))):
            total += _flops(one, batch * rows, below)
        total += batch * seen * scores * (3 if below else 1)
        if model.encoder.num_layers:
            # The queries' gradient takes as much as the scores; that of keys and values again.
            keys = learns or any(_trains(params[stack]["cross_attention"][name]) for name in _FROM_SOURCE)
            factor = 1 + below + (below and keys)
            total += batch * tokens * cross_attention_flops_per_token(own) * factor
    return total


def _of_sources(params: weights.Params) -> list[Multiplied]:
    """What each token of a source is multiplied with to make the keys and values of the layers."""
    stacks = [params[stack]["cross_attention"] for stack in STACKS if stack in params]
    return [multiplied(stack[name]["kernel"]) for stack in stacks for name in _FROM_SOURCE]


def _flops(one: Multiplied, rows: float, below: bool) -> int:
    """Of so many rows, with a gradient for what is below if that trains."""
    return round(rows * 2 * ((2 if below else 1) * one.entries + one.trained)) + one.once


def _trains(tree: Any) -> bool:
    return any(jax.tree.leaves(weights.trainable_tree(tree)))


_FROM_SOURCE = ("key", "value")
"""The parts of attention to a source that meet its tokens and no others."""
_SOURCE = re.compile(f"cross_attention/({'|'.join(_FROM_SOURCE)})/")
_ABOVE = ("frozen_layers", "layers", "final_norm", "head", "unembed")


def _frontend_flops(model: ModelConfig, params: weights.Params, sequence_tokens: int) -> int:
    """FLOPs a sequence of what makes its tokens of an image or of audio, and of its gradients."""
    total, below = 0, False
    for path, rows in frontend_rows(model, sequence_tokens).items():
        room, name = path.split("/")
        w = params[room][name]["kernel"]
        one = _made_dense(w) if name == "positions" else multiplied(w)
        total += rows * 2 * (one.entries + (one.entries if below else _second_factor(w)) + one.trained)
        below |= _trains(params[room][name])
        norm = params[room].get(f"{name}_norm", params[room].get(name.replace("convolution", "norm"), {}))
        below |= _trains(norm)
    return round(total)


def _second_factor(w: Any) -> int:
    """Entries of what the first of a weight's two factors is multiplied with, which asks for that one's gradient."""
    return multiplied(w.v if isinstance(w, LowRank) else w.b).entries if isinstance(w, LowRank | Lora) else 0


def _of_the_head(model: ModelConfig, params: weights.Params) -> list[Any]:
    """The matrices behind the last block."""
    tied = model.head.of_vocabulary and output_matrix(params) is None
    found = [params["embed"]["table"]] if tied else []

    def one(path, w):
        if path.endswith("kernel"):
            found.append(w)

    weights.map_weights(one, {name: params[name] for name in ("head", "unembed") if name in params})
    return found


def multiplied(w: Any) -> Multiplied:
    """What each token is multiplied with in `weights.contract` with a weight of any kind; a stack counts whole."""
    if isinstance(w, LowRank):
        return multiplied(w.u) + multiplied(w.v)
    if isinstance(w, Lora):
        return _frozen(w.base) + multiplied(w.a) + multiplied(w.b)
    if isinstance(w, Adapters):
        update = (math.prod(w.a.shape) + math.prod(w.b.shape)) // w.a.shape[-3]
        return _frozen(w.base) + Multiplied(update, update)
    if isinstance(w, Frozen):
        return _frozen(w.weight)
    if isinstance(w, Dora):
        return multiplied(w.weight) + Multiplied(once=_update_flops(w.weight))
    if isinstance(w, Scaled | Observed):
        return multiplied(w.weight)
    return _made_dense(w)


def _made_dense(w: Any) -> Multiplied:
    entries = math.prod(jax.eval_shape(weights.materialize, w).shape)
    return Multiplied(entries, entries if any(jax.tree.leaves(weights.trainable(w))) else 0)


def _frozen(w: Any) -> Multiplied:
    return dataclasses.replace(multiplied(w), trained=0)


def _of_kernels(params: weights.Params, model: ModelConfig) -> tuple[Multiplied, Multiplied]:
    """Of a stack's kernels, those that every token meets, and those of experts."""
    every, routed = [Multiplied()], [Multiplied()]

    def one(path, w):
        if model.experts and KERNELS.search(path):
            routed.append(multiplied(w) if model.capacity_factor else _made_dense(w))
        elif path.endswith("kernel") and not _SOURCE.search(path):
            every.append(multiplied(w))

    weights.map_weights(one, params)
    return sum(every[1:], every[0]), sum(routed[1:], routed[0])


def _rows_of_an_expert(model: ModelConfig, tokens: int) -> float:
    """Rows of a sequence that an expert multiplies, on average."""
    if not model.experts:
        return 0
    return capacity(model, tokens) if model.capacity_factor else tokens * model.experts_per_token / model.experts


def _update_flops(w: Any) -> int:
    """FLOPs of the product a·b that a dense array of a Lora needs; 0 for other kinds."""
    if not isinstance(w, Lora):
        return 0
    shape = jax.eval_shape(weights.materialize, w).shape
    return 2 * math.prod(shape) * jax.eval_shape(weights.materialize, w.a).shape[-1]

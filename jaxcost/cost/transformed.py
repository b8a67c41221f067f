"""The closed form for weights of any kind: FLOPs of a training step from the shapes of a tree of weights alone.

What a transform saves follows from its kinds: what a token is multiplied with, and which of it gets a gradient. FLOPs
are operations (a multiply-add is two), without recomputation; elementwise work is left out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jaxcost import weights
from jaxcost.cost.closed_form import Attention, attention_flops_per_token
from jaxcost.models import optional
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import STACKS, resized
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

    The stack `frozen_layers` costs its forward pass only, unless something in it or below it trains. Masked weights,
    and those that train quantised, are made dense first, so they cost what dense ones do; so does a quantised weight,
    whose products this does not tell apart by operand type. Virtual tokens are tokens of the layers, not of the
    unembedding. Experts are not told apart: each token counts as multiplied with all matrices of a stack. Unrolled, a
    compiler drops the gradient of the lowest layer's inputs where nothing below it trains.

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
    below = any(jax.tree.leaves(weights.trainable_tree({k: params[k] for k in params if k not in _ABOVE})))
    total = 0
    for stack in STACKS:
        if stack not in params:
            continue
        below |= stack == "layers" or any(jax.tree.leaves(weights.trainable_tree(params[stack])))
        depth = jax.tree.leaves(params[stack])[0].shape[0]
        one = _of_kernels(params[stack])
        passes = 2 if below else 1
        scores = attention_flops_per_token(dataclasses.replace(model, num_layers=depth), seen, attention)
        per_token = 2 * (passes * one.entries + one.trained)
        total += batch * (tokens * per_token + seen * scores * (3 if below else 1)) + one.once
    unembed = params["unembed"]["kernel"] if "unembed" in params else params["embed"]["table"]
    one = multiplied(unembed)
    return total + batch * sequence_tokens * 2 * (2 * one.entries + one.trained) + one.once


_ABOVE = ("frozen_layers", "layers", "final_norm", "unembed")


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
    entries = math.prod(jax.eval_shape(weights.materialize, w).shape)
    return Multiplied(entries, entries if any(jax.tree.leaves(weights.trainable(w))) else 0)


def _frozen(w: Any) -> Multiplied:
    return dataclasses.replace(multiplied(w), trained=0)


def _of_kernels(params: weights.Params) -> Multiplied:
    found = [Multiplied()]
    weights.map_weights(lambda path, w: found.append(multiplied(w)) if path.endswith("kernel") else None, params)
    return sum(found[1:], found[0])


def _update_flops(w: Any) -> int:
    """FLOPs of the product a·b that a dense array of a Lora needs; 0 for other kinds."""
    if not isinstance(w, Lora):
        return 0
    shape = jax.eval_shape(weights.materialize, w).shape
    return 2 * math.prod(shape) * jax.eval_shape(weights.materialize, w.a).shape[-1]

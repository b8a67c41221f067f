"""The kinds of weight: what stands where a dense matrix stood.

A kernel is a matrix of shape (..., in, out): the last two axes are the matrix, and whatever stands before them is a
stack (layers, experts). In a tree of parameters it is a plain array, or one of the kinds of this room: a frozen
dataclass, registered as a pytree, whose own weights may again be of any kind. Each kind knows how to

* `contract` with an activation, the path that computes;
* `materialize` as a dense array, which is what it means;
* name the logical axes of its arrays, given those of the matrix that it stands for;
* say which of its arrays train.

One law holds for every kind and every nesting: `contract(x, w) == x @ materialize(w)` to the arithmetic's tolerance.
"""

from jaxcost.weights.base import Weight, contract, is_weight, logical_axes, materialize, trainable
from jaxcost.weights.frozen import Frozen
from jaxcost.weights.lowrank import Lora, LowRank
from jaxcost.weights.observed import Inputs, Observed, blank_inputs
from jaxcost.weights.quantized import (
    QuantAware,
    Quantized,
    QuantSpec,
    fake_quantize,
    integer_limit,
    quantization_scale,
)
from jaxcost.weights.sparse import Masked, Scored, kept_gradients
from jaxcost.weights.tree import Params, combine, map_weights, merge, partition, path_name, trainable_tree

__all__ = [
    "Frozen",
    "Inputs",
    "Lora",
    "LowRank",
    "Masked",
    "Observed",
    "Params",
    "QuantAware",
    "QuantSpec",
    "Quantized",
    "Scored",
    "Weight",
    "blank_inputs",
    "combine",
    "contract",
    "fake_quantize",
    "integer_limit",
    "is_weight",
    "kept_gradients",
    "logical_axes",
    "map_weights",
    "materialize",
    "merge",
    "partition",
    "path_name",
    "quantization_scale",
    "trainable",
    "trainable_tree",
]

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

from jaxcost.weights.adapters import Adapters, choose, stack_adapters
from jaxcost.weights.base import (
    Weight,
    contract,
    contract_all,
    is_weight,
    logical_axes,
    materialize,
    split_keys,
    trainable,
)
from jaxcost.weights.frozen import Frozen
from jaxcost.weights.lowrank import Dora, Lora, LowRank, column_norm
from jaxcost.weights.observed import Inputs, Observed, blank_inputs
from jaxcost.weights.quant_aware import QuantAware, QuantSpec, fake_quantize
from jaxcost.weights.quantized import (
    GRIDS,
    GridName,
    Quantized,
    encode,
    group_scale,
    integer_limit,
    quantization_scale,
    quantized,
    spread,
    storage_bytes,
)
from jaxcost.weights.scaled import Scaled
from jaxcost.weights.sparse import Masked, Scored, forget_pruned, kept_gradients
from jaxcost.weights.tree import Params, combine, map_weights, merge, partition, path_name, trainable_tree

__all__ = [
    "Adapters",
    "Dora",
    "GRIDS",
    "Frozen",
    "GridName",
    "Inputs",
    "Lora",
    "LowRank",
    "Masked",
    "Observed",
    "Params",
    "QuantAware",
    "QuantSpec",
    "Quantized",
    "Scaled",
    "Scored",
    "Weight",
    "blank_inputs",
    "choose",
    "column_norm",
    "combine",
    "contract",
    "contract_all",
    "encode",
    "fake_quantize",
    "forget_pruned",
    "group_scale",
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
    "quantized",
    "split_keys",
    "spread",
    "stack_adapters",
    "storage_bytes",
    "trainable",
    "trainable_tree",
]

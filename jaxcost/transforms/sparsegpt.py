"""SparseGPT: which weights go, and how those that stay make up for it. Source: arXiv:2301.00774."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxcost.transforms.masks import drop_smallest, keep_largest_of_group
from jaxcost.transforms.second_order import solve
from jaxcost.transforms.whole import by_outputs
from jaxcost.weights import Inputs


def sparsegpt(
    w: jax.Array,
    kept: jax.Array,
    inputs: Inputs,
    sparsity: float,
    groups: tuple[int, int] | None,
    damping: float,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """New values for the weights that stay, in w's dtype, and the mask.

    A weight's score is (w / pivot)², twice what its loss costs in the output. In every block of inputs, int(n·sparsity)
    and one more of its n weights go, as in the authors' code; of equals, the first.

    Args:
      w: (..., in, out).
      kept: boolean, of w's shape; what is pruned already stays so.
      inputs: with the gram matrices.
      sparsity: share that goes; none at 0.
      groups: (n, m) keeps the n best of every m neighbours along `in` instead.
      damping: share of the mean of the Hessian's diagonal that is added to it.
      block: inputs whose mask is chosen together.
    """

    def one(share, w, kept, gram, count):
        def plan(rows, pivots, first):
            score = jnp.square(rows / pivots[:, None])
            before = lax.dynamic_slice_in_dim(kept, first, rows.shape[0])
            if groups is not None:
                return keep_largest_of_group(score, before, *groups)
            # A block's mask is chosen among all outputs.
            score, before = share.all(score), share.all(before)
            number = min(int(score.size * sparsity) + 1, score.size) if sparsity else 0
            return share.mine(drop_smallest(score, before, number))

        def decide(row, mask):
            return jnp.where(mask, row, 0.0), mask

        size = block if groups is None else max(block // groups[1], 1) * groups[1]
        group = None if groups is None else groups[1]
        return solve(w, gram, count, plan, decide, damping=damping, block=size, group=group)

    dense, mask = by_outputs(one, (w, kept), (inputs.gram, inputs.count))
    return dense.astype(w.dtype), mask

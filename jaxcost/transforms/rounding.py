"""Which point of a grid each value of a weight goes to: the nearest, or one that the inputs speak for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxcost.transforms.second_order import solve
from jaxcost.transforms.whole import by_outputs
from jaxcost.weights import GridName, Inputs, Quantized, encode, group_scale, quantized
from jaxcost.weights.quantized import decode

_BLOCK = 128
_AWQ_STEPS = 20
_AWQ_SMALLEST = 1e-4


def gptq(dense: jax.Array, mask: jax.Array | None, inputs: Inputs, grid: GridName, group: int | None) -> Quantized:
    """The dense weight (..., in, out) on a grid so that its outputs stay: each input's rounding error goes to the next.

    Scales are those of rounding to nearest; a group's are taken when its turn comes, as its rows are by then. What the
    mask prunes stays zero. Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323.

    Args:
      dense: the weight.
      mask: False is pruned; None prunes nothing.
      inputs: with the gram matrix.
      grid: of the codes.
      group: neighbours along the contracted axis that share a scale; None for all of them.
    """

    def one(share, w, kept, gram, count):
        # The scales of whole channels are those of the weight as it comes in.
        whole = group_scale(w, grid) if group is None else None

        def plan(rows, pivots, first):
            allowed = lax.dynamic_slice_in_dim(kept, first, len(rows))
            scale = group_scale(jnp.where(allowed, rows, 0.0), grid) if whole is None else whole
            return jnp.broadcast_to(scale, rows.shape), allowed

        def decide(row, planned):
            scale, allowed = planned
            code = encode(jnp.where(allowed, row, 0.0) / scale, grid)
            return decode(code, grid, jnp.float32) * scale, (code, scale)

        block = _BLOCK if group is None else group * max(1, _BLOCK // group)
        _, (codes, scales) = solve(w, gram, count, plan, decide, block=block, group=group)
        return codes, scales[:: group or len(scales)]

    dense = dense.astype(jnp.float32)
    kept = jnp.ones(dense.shape, bool) if mask is None else mask
    codes, scale = by_outputs(one, (dense, kept), (inputs.gram, inputs.count))
    return Quantized(codes, scale, grid=grid)


def awq_factor(dense: jax.Array, inputs: Inputs, grid: GridName, group: int | None) -> jax.Array:
    """What each row of a weight (..., in, out) is multiplied with before it is rounded to nearest: float32 (..., in).

    Rows whose inputs are large get more of the grid: their root mean square to a power, the power being the best of 20
    from 0 (which is rounding to nearest) up, by the error of the layer's output. Source: Lin et al. 2023 (AWQ),
    arXiv:2306.00978, section 3.2, with root mean squares in the place of mean magnitudes.
    """

    def one(share, w, gram, squares, count):
        size = jnp.sqrt(squares / jnp.maximum(count, 1.0))

        def factor(power):
            raw = jnp.maximum(size**power, _AWQ_SMALLEST)
            return raw / jnp.sqrt(jnp.max(raw) * jnp.min(raw))

        def error(power):
            scaled = factor(power)[:, None]
            change = quantized(w * scaled, grid, group).materialize() / scaled - w
            return jnp.sum(change * jnp.matmul(gram, change, precision="highest"))

        powers = jnp.arange(_AWQ_STEPS) / _AWQ_STEPS
        return factor(powers[jnp.argmin(share.total(lax.map(error, powers)))])

    dense = dense.astype(jnp.float32)
    return by_outputs(one, (dense,), (inputs.gram, inputs.squares, inputs.count), gives_outputs=False)

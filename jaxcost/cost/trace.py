"""Exact matmul FLOPs of a function from its jaxpr, before any compiler has seen it.

The count is of the whole computation over all devices. It is what the program asks for: a compiler may do less
(it drops some recomputation) or more (padding, masked attention blocks). `jaxcost.cost.hlo` reads what it did.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from jaxcost.cost import contractions

_TRANSPARENT = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "custom_lin",
    }
)
_NOT_COUNTED = frozenset(
    {
        "cholesky",
        "custom_linear_solve",
        "eig",
        "eigh",
        "ffi_call",
        "fft",
        "householder_product",
        "io_callback",
        "lu",
        "pallas_call",
        "pure_callback",
        "qr",
        "scaled_matmul",
        "svd",
        "triangular_solve",
    }
)


@dataclasses.dataclass(frozen=True)
class OpFlops:
    """Matmul and convolution FLOPs of a function, over all devices."""

    flops: int
    """FLOPs of all operand types."""
    flops_by_type: dict[str, int]
    """FLOPs by operand type: `bf16`, `f32`, `int8`, `fp8`, ..."""
    unestimated: tuple[str, ...]
    """What could not be counted, by name: loops of unknown length, kernels, decompositions. Not in `flops`."""


def flops_of(fn: Callable, *args: Any, **kwargs: Any) -> OpFlops:
    """Counts the matmul FLOPs of `fn(*args, **kwargs)` without running or compiling it.

    Results that `fn` does not return are removed first, so an unused weight gradient costs nothing. A scan counts
    its length, a `cond` its most expensive branch, a `shard_map` each of its devices.

    Args:
        fn: any function that JAX can trace, jitted or not.
        *args: arrays or `jax.ShapeDtypeStruct`s.
        **kwargs: the same, by name.

    Returns:
        The FLOPs (multiply-add = 2) by operand type, and what could not be counted.
    """
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    tally = _count(live)
    return OpFlops(tally.total_flops, dict(tally.by_type), tally.listed())


def _count(jaxpr: core.Jaxpr) -> contractions.FlopTally:
    """The tally of one jaxpr, everything inside it included."""
    tally = contractions.FlopTally()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            _count_dot(tally, equation)
        elif name == "conv_general_dilated":
            _count_convolution(tally, equation)
        elif name == "ragged_dot_general":
            _count_ragged_dot(tally, equation)
        elif name == "scan":
            tally.add(_count(params["jaxpr"].jaxpr), times=params["length"])
        elif name == "while":
            trip = _count(params["body_jaxpr"].jaxpr)
            trip.add(_count(params["cond_jaxpr"].jaxpr))
            tally.add_unknown_loop("while", trip)
        elif name == "cond":
            tally.add(max((_count(branch.jaxpr) for branch in params["branches"]), key=lambda t: t.total_flops))
        elif name == "shard_map":
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            tally.add(_count(params["jaxpr"]), times=devices)
        elif name in _NOT_COUNTED:
            tally.unestimated[name] += 1
        else:
            _count_inner(tally, name, params)
    return tally


def _count_inner(tally: contractions.FlopTally, name: str, params: dict[str, Any]):
    """Adds the jaxprs inside a call; those of a primitive we do not know are listed if they hold FLOPs."""
    for inner in core.jaxprs_in_params(params):
        inner_tally = _count(inner)
        if name in _TRANSPARENT:
            tally.add(inner_tally)
        elif inner_tally.total_flops or inner_tally.unestimated:
            tally.unestimated[name] += 1


def _count_dot(tally: contractions.FlopTally, equation: core.JaxprEqn):
    lhs, rhs = (operand.aval for operand in equation.invars)
    (lhs_contracting, _), _ = equation.params["dimension_numbers"]
    flops = contractions.dot_flops(equation.outvars[0].aval.shape, [lhs.shape[d] for d in lhs_contracting])
    tally.count(lhs.dtype.name, rhs.dtype.name, flops)


def _count_ragged_dot(tally: contractions.FlopTally, equation: core.JaxprEqn):
    """Each row of the left operand meets one group of the right one, so the group dimension adds no FLOPs."""
    lhs, rhs = (operand.aval for operand in equation.invars[:2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, rhs_contracting), (_, rhs_batch) = numbers.dot_dimension_numbers
    shared = {*rhs_contracting, *rhs_batch, *numbers.rhs_group_dimensions}
    columns = math.prod(size for dimension, size in enumerate(rhs.shape) if dimension not in shared)
    tally.count(lhs.dtype.name, rhs.dtype.name, 2 * math.prod(lhs.shape) * columns)


def _count_convolution(tally: contractions.FlopTally, equation: core.JaxprEqn):
    lhs, rhs = (operand.aval for operand in equation.invars)
    output, params = equation.outvars[0].aval, equation.params
    lhs_spec, rhs_spec, output_spec = params["dimension_numbers"]
    window = [
        contractions.WindowDimension(
            input_size=lhs.shape[lhs_spec[2 + i]],
            kernel_size=rhs.shape[rhs_spec[2 + i]],
            output_size=output.shape[output_spec[2 + i]],
            stride=params["window_strides"][i],
            padding_low=params["padding"][i][0],
            input_dilation=params["lhs_dilation"][i],
            kernel_dilation=params["rhs_dilation"][i],
        )
        for i in range(len(params["window_strides"]))
    ]
    flops = contractions.convolution_flops(
        output.shape[output_spec[0]], output.shape[output_spec[1]], rhs.shape[rhs_spec[1]], window
    )
    tally.count(lhs.dtype.name, rhs.dtype.name, flops)

"""Calibration: what the weights of a model are multiplied with, gathered over a fixed budget of data.

    params = calibrated(chain(prune(...), quantize(...)), params, key, forward, batches)

The model is only a function from weights and a batch to anything that depends on all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcost import weights
from jaxcost.transforms.base import Calibration, CalibrationError, Chain, Statistics, Transform, chain
from jaxcost.transforms.manifest import manifest
from jaxcost.weights import Inputs, Observed, Params

Forward = Callable[[Params, Any], jax.Array]
"""(params, batch) → an array that depends on every weight."""


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """The data that transforms may look at."""

    batches: int = 16
    """Batches of the training split."""

    def __post_init__(self):
        if self.batches < 1:
            raise ValueError(f"calibration.batches is {self.batches}; it must be at least 1.")


def calibrate(forward: Forward, params: Params, batches: Iterable[Any], wanted: dict[str, Statistics]) -> Calibration:
    """The statistics of the inputs of the weights at the paths in `wanted`, summed over the batches.

    Args:
      forward: the model.
      params: its weights.
      batches: what it is run on; all are used.
      wanted: path → `norms` or `gram`. A gram matrix takes in² floats for each matrix of a stack.

    Raises:
      CalibrationError: there are no batches, or an input is infinite or not a number, or a weight is never
        multiplied with anything.
    """
    gather = _gatherer(forward)
    probes = {}

    def probe(path, w):
        if wanted.get(path, "none") != "none":
            shape = jax.eval_shape(weights.materialize, w).shape
            probes[path] = weights.blank_inputs(shape, gram=wanted[path] == "gram")

    weights.map_weights(probe, params)
    found = probes
    for batch in batches:
        new = gather(probes, params, batch)
        found = {path: found[path] + new[path] for path in found}
    for path, inputs in found.items():
        if not bool(jnp.all(jnp.isfinite(inputs.squares))):
            raise CalibrationError(
                f"The calibration data make the inputs of {path} infinite or not a number; clean the data."
            )
        if not bool(jnp.any(inputs.count > 0)):
            raise CalibrationError(f"The calibration data never reach {path}; give some, or more, or other data.")
    return found


def calibrated(
    transform: Transform,
    params: Params,
    key: jax.Array | None,
    forward: Forward,
    batches: Callable[[], Iterable[Any]],
    place: Callable[..., Params] = lambda make, *arguments: make(*arguments),
) -> Params:
    """The transformed weights; each transform of a chain sees the activations of what those before it left.

    Args:
      transform: one, or a chain.
      params: the weights.
      key: as for the transform itself.
      forward: the model.
      batches: makes the calibration data; called once for each transform that asks for statistics.
      place: computes make(*arguments), where the caller wants the result to live.

    Raises:
      CalibrationError: the data are of no use.
      BrokenError: a transform takes from a weight what an earlier one had made true of it.
    """
    whole = transform if isinstance(transform, Chain) else chain(transform)
    promised = manifest(params)
    for one, one_key in whole.steps(key):
        if isinstance(one, Chain):
            params = calibrated(one, params, one_key, forward, batches, place)
        else:
            wanted = {path: settings.statistics() for path, settings in one.picked(params).items()}
            needs = any(statistics != "none" for statistics in wanted.values())
            calibration = calibrate(forward, params, batches(), wanted) if needs else None
            params = place(one, params, one_key, calibration)
        promised = whole.check(promised, params, one)
    return params


def _gatherer(forward: Forward) -> Callable[[dict[str, Inputs], Params, Any], dict[str, Inputs]]:
    def total(probes, params, batch):
        watched = weights.map_weights(lambda path, w: Observed(w, probes[path]) if path in probes else w, params)
        # What is summed is of no account: only the probes' cotangents are, and those do not depend on it.
        return jnp.sum(forward(watched, batch).astype(jnp.float32))

    return jax.jit(jax.grad(total))

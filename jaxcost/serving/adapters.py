"""A base and what was fine-tuned from it by low-rank adapters, as one tree in which each row chooses."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxcost import weights


def with_adapters(base: weights.Params, adapters: Mapping[str, weights.Params]) -> weights.Params:
    """The base with the adapters of other trees beside it, numbered in their order; the base itself is -1.

    Args:
      base: weights of any kinds without adapters.
      adapters: trees that `lora` made over the same weights, by name.

    Raises:
      ValueError: a tree has other weights below its adapters, or adapters that cannot stand in one batch.
    """
    for name, tree in adapters.items():
        try:
            weights.map_weights(_check, tree, base)
        except ValueError as error:
            raise ValueError(f"The adapter {name} does not fit: {error}") from None
    try:
        return weights.stack_adapters(list(adapters.values()))
    except ValueError as error:
        raise ValueError(f"The adapters {', '.join(adapters)} cannot be served together: {error}") from None


def _check(path: str, tuned, base) -> None:
    if isinstance(tuned, weights.Dora):
        raise ValueError(f"{path} has a magnitude of its own (DoRA), which rows cannot choose; serve it alone.")
    adapted = isinstance(tuned, weights.Lora)
    if adapted and path.endswith("table"):
        raise ValueError(f"{path} has an adapter, which the rows of a table cannot choose; serve it alone.")
    below = tuned.base if adapted else tuned
    one, other = (weights.materialize(w) for w in (below, base))
    if one.shape != other.shape or not jnp.array_equal(one, other):
        raise ValueError(f"{path} is another than the base's; train adapters from this base, and nothing beside them.")

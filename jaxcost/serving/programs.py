"""Programs that are compiled before the first request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxcost import sharding


def compiled(function: Callable, donated: int | tuple[int, ...], places: Any, *arguments: Any) -> Callable:
    """A function compiled for such arguments, of which some are used up; it compiles nothing when it is called, or,
    where `sharding.runnable` must take the jitted function, when it is called again."""
    jitted = jax.jit(function, donate_argnums=donated, out_shardings=places)
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None))  # noqa: E731
    made = jitted.lower(*jax.tree.map(like, arguments)).compile()
    return sharding.runnable(jitted, made, *(a for a in arguments if _on_device(a)))


def _on_device(tree: Any) -> bool:
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))

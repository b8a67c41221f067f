"""Walks over trees of weights: maps, merging, and the arrays that train apart from those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxcost.weights.base import is_weight, materialize, trainable

Params = Any
"""A nested dict whose leaves are arrays or kinds of weight."""


def map_weights(f: Callable[..., Any], params: Params, *rest: Params) -> Params:
    """Maps f(path, weight, *rest) over the weights of a tree; path is 'layers/mlp/up/kernel'."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w, *more: f(path_name(path), w, *more), params, *rest, is_leaf=is_weight
    )


def path_name(path: tuple) -> str:
    """The keys of a tree path joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def merge(params: Params) -> Params:
    """A copy of the tree in which every weight is the dense array that it means. There is no way back."""
    return map_weights(lambda _, w: materialize(w), params)


def trainable_tree(params: Params) -> Params:
    """`trainable` over a whole tree."""
    return map_weights(lambda _, w: trainable(w), params)


def partition(params: Params) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The arrays that train and those that do not, each as a flat dict from path to array.

    Differentiate and optimise the first alone: a gradient or a moment of a frozen array is a saving thrown away.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    trains = jax.tree.leaves(trainable_tree(params))
    named = [(path_name(path), leaf) for path, leaf in flat]
    chosen = {name: leaf for (name, leaf), train in zip(named, trains, strict=True) if train}
    return chosen, {name: leaf for name, leaf in named if name not in chosen}


def combine(structure: Params, *parts: dict[str, jax.Array]) -> Params:
    """The inverse of `partition`: a tree of `structure`'s shape with its arrays taken from the flat dicts."""
    arrays = {name: leaf for part in parts for name, leaf in part.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[path_name(path)], structure)

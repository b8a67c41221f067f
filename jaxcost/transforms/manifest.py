"""The manifest: what earlier steps made true of each weight, so that a later one keeps it or is refused.

    promised = manifest(sparse)
    promised = check(promised, adapted, step="lora")

A manifest is JSON: the path of a weight → its invariants, measured where the arrays are at hand and read off the
structure where they are only shapes (`jax.eval_shape`, `jax.jit`):

    sparsity   share of exact zeros that each matrix of a stack has at least; None where only the mask is known of
    pattern    N:M, where of every M neighbours along the contracted axis exactly N are kept
    rank       bound on the rank, that of the two factors; factors that are pruned have entries of their own
    grid       name of the grid that the stored values lie on, such as int8

What an adapter adds beside a frozen base leaves the invariants of that base as they are; merging it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcost import weights
from jaxcost.weights import LowRank, Masked, Params, QuantAware, Quantized

INVARIANTS = ("sparsity", "pattern", "rank", "grid")

Manifest = dict[str, dict[str, Any]]
"""Path of a weight → its invariants by name; weights without any are left out."""

_GROUPS = (2, 4, 8, 16, 32)
_FACTORS = ("u", "v")
_FROZEN = "frozen_"


class BrokenError(ValueError):
    """A step took from a weight what an earlier one had made true of it."""


def manifest(params: Params) -> Manifest:
    """The invariants of every weight of a tree of arrays, tracers or ShapeDtypeStructs."""
    found = ((path, _invariants(w)) for path, w in _walk(params))
    return {path: entry for path, entry in found if entry}


def check(before: Manifest, params: Params, waive: Sequence[str] = (), step: str = "the last step") -> Manifest:
    """The manifest to go on with: what was promised and still holds, and what `params` has beside it.

    Args:
      before: what held until now.
      params: the weights after a step.
      waive: names of invariants that the step may break; they are promised no longer.
      step: the step, for the message.

    Raises:
      BrokenError: an invariant is broken; the message names it and the weight.
      ValueError: there is no invariant of a name in `waive`.
    """
    for name in waive:
        if name not in INVARIANTS:
            raise ValueError(f"There is no invariant {name!r} to waive; choose from {', '.join(INVARIANTS)}.")
    nodes = dict(_walk(params))
    kept = {}
    for path, entry in before.items():
        # `freeze` cuts a stack in two; a promise of the whole is one of each part.
        parts = [nodes[place] for place in (path, _FROZEN + path) if place in nodes]
        kept[path] = {name: value for name, value in entry.items() if name not in waive}
        for name, value in kept[path].items():
            found = [_measure(name, value, part) for part in parts] or [(False, "nothing")]
            if not all(holds for holds, _ in found):
                now = next(now for holds, now in found if not holds)
                raise BrokenError(
                    f"{path} had {name} {_said(name, value)} and has {now} after {step}; "
                    f"leave that weight out, change the order, or allow it with waive=({name!r},)."
                )
    now = manifest(params)
    joined = {path: kept.get(path, {}) | now.get(path, {}) for path in (*kept, *(p for p in now if p not in kept))}
    return {path: entry for path, entry in joined.items() if entry}


def _walk(params: Params) -> Iterator[tuple[str, Any]]:
    """Every weight with its path, and after it the factors of products."""
    found: list[tuple[str, Any]] = []
    weights.map_weights(lambda path, w: found.append((path, w)), params)
    for path, w in found:
        yield path, w
        core = _nest(w)[-1]
        if isinstance(core, LowRank):
            yield from ((f"{path}/{factor}", getattr(core, factor)) for factor in _FACTORS)


def _nest(w: Any) -> list[Any]:
    """The weight and what it stands on, from the outside in: an adapter's base, the weight that is masked."""
    found = [w]
    while weights.is_weight(w) and (hasattr(w, "base") or hasattr(w, "weight")):
        w = w.base if hasattr(w, "base") else w.weight
        found.append(w)
    return found


def _stored(nest: list[Any]) -> Any:
    """What is sparse in a nest: the outermost mask, or what stands below all adapters."""
    adapters = [index for index, node in enumerate(nest) if hasattr(node, "base")]
    masks = [index for index, node in enumerate(nest) if isinstance(node, Masked)]
    below = adapters[-1] + 1 if adapters else 0
    return nest[min(masks[0], below) if masks else below]


def _invariants(w: Any) -> dict[str, Any]:
    nest = _nest(w)
    mask = next((node.mask for node in nest if isinstance(node, Masked)), None)
    found = {}
    if mask is not None:
        concrete = _concrete(mask)
        found["sparsity"] = float(_least_zeros(mask)) if concrete else None
        found |= {"pattern": pattern} if concrete and (pattern := _pattern(mask)) else {}
    found |= {"rank": rank} if (rank := _rank(nest)) is not None else {}
    return found | ({"grid": grid} if (grid := _grid(nest)) is not None else {})


def _measure(name: str, promised: Any, w: Any) -> tuple[bool, str]:
    """Whether one invariant holds of a weight, and what is found instead."""
    nest = _nest(w)
    if name == "rank":
        rank = _rank(nest)
        return rank is not None and rank <= promised, "no factors" if rank is None else f"rank {rank}"
    if name == "grid":
        grid = _grid(nest)
        return grid == promised, grid or "no grid"
    stored = _stored(nest)
    if promised is None or not all(map(_concrete, jax.tree.leaves(stored))):
        masked = any(isinstance(node, Masked) for node in nest)
        return masked, "a mask" if masked else "no mask"
    zeros = weights.materialize(stored) == 0
    if name == "sparsity":
        share = float(_least_zeros(~zeros))
        return share >= promised - 1e-6, f"{share:.2%}"
    n, m = map(int, promised.split(":"))
    divides = zeros.shape[-2] % m == 0
    most = int(jnp.max(_kept_of_group(~zeros, m))) if divides else m
    return most <= n, f"{most}:{m}"


def _said(name: str, value: Any) -> str:
    return f"{value:.2%}" if name == "sparsity" and value is not None else str(value)


def _rank(nest: list[Any]) -> int | None:
    if not isinstance(nest[-1], LowRank):
        return None
    return jax.eval_shape(weights.materialize, nest[-1].u).shape[-1]


def _grid(nest: list[Any]) -> str | None:
    for node in nest:
        if isinstance(node, Quantized):
            return node.grid
        if isinstance(node, QuantAware):
            return f"int{node.spec.bits}"
    return None


def _concrete(array: Any) -> bool:
    return not isinstance(array, jax.ShapeDtypeStruct | jax.core.Tracer)


@jax.jit
def _least_zeros(kept: jax.Array) -> jax.Array:
    """The smallest share of zeros of any matrix of a stack (..., in, out)."""
    pruned = jnp.sum(~kept, axis=(-2, -1), dtype=jnp.int32)
    return jnp.min(pruned) / (kept.shape[-2] * kept.shape[-1])


def _pattern(mask: jax.Array) -> str | None:
    """The N:M of the smallest M that holds exactly, or None."""
    for m in _GROUPS:
        if mask.shape[-2] % m == 0:
            kept = _kept_of_group(mask, m)
            least, most = int(jnp.min(kept)), int(jnp.max(kept))
            if 0 < least == most < m:
                return f"{most}:{m}"
    return None


def _kept_of_group(kept: jax.Array, m: int) -> jax.Array:
    *stack, inward, outward = kept.shape
    return jnp.sum(kept.reshape(*stack, inward // m, m, outward), axis=-2, dtype=jnp.int32)

"""Trained weights as one .npz file: what a user of them must store, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.data.files import atomic_write
from jaxcost.transforms.manifest import check, manifest

_MANIFEST = "manifest"


def export(params: weights.Params, path: Path) -> int:
    """Writes what a user of these weights must store to one .npz file, by path; returns its bytes on disk.

    Beside a frozen base, which is stored once for all of its adapters, only what trains is written; a base that is an
    adapter's own (PiSSA's) is written with it. A mask is written
    as bits, eight a byte and whole matrices one after the other, and beside it the kept values alone, in that order.
    Codes of 4 bits are written two a byte, the first in the low half, along the last axis, and 8-bit floats as their
    bytes; the type ends the array's name, as in 'codes.int4'. What has invariants carries their manifest, as JSON. The
    file is compressed (deflate). The same weights give the same bytes.
    """

    def stands_on_a_base(node):
        return isinstance(node, weights.Frozen | weights.Lora)

    adapter_only = any(map(stands_on_a_base, jax.tree.leaves(params, is_leaf=stands_on_a_base)))
    written = weights.partition(params)[0] | _packed(_own_bases(params)) if adapter_only else _packed(params)
    stored = dict(_stored(name, a) for name, a in jax.device_get(written).items())
    promised = manifest(params)
    if promised:
        stored[_MANIFEST] = np.frombuffer(json.dumps(promised, sort_keys=True).encode(), np.uint8)
    with atomic_write(path) as file:
        np.savez_compressed(file, **stored)
    return path.stat().st_size


def read_export(path: Path, params: weights.Params) -> weights.Params:
    """The weights that `export` wrote, verified against their manifest; pruned values are zero.

    Args:
      path: the file.
      params: a tree of their structure; its arrays stand where the file has none, as below adapters. Elsewhere shapes
        are enough.

    Raises:
      BrokenError: the weights are not what the manifest says.
      ValueError: the file lacks an array, and `params` has only its shape.
    """
    with np.load(path) as file:
        stored = {name: file[name] for name in file.files}

    def array(name: str, like: Any) -> Any:
        found = stored.get(name, stored.get(f"{name}.{like.dtype.name}"))
        if found is not None:
            return jnp.asarray(_read(found, like))
        if isinstance(like, jax.ShapeDtypeStruct):
            raise ValueError(f"{path} does not hold {name}; give the base that its adapters were trained on.")
        return like

    def one(place, node):
        name = weights.path_name(place)
        bits = stored.get(f"{name}/mask") if isinstance(node, weights.Masked) else None
        if bits is None:
            return _mapped(lambda below, leaf: array(f"{name}{below}", leaf), node)
        mask = np.unpackbits(bits, count=int(np.prod(node.mask.shape))).astype(bool).reshape(node.mask.shape)

        def unpacked(below, leaf):
            if leaf.shape != mask.shape:
                return array(f"{name}/weight{below}", leaf)
            dense = np.zeros(leaf.shape, leaf.dtype)
            dense[mask] = array(f"{name}/weight{below}", jax.ShapeDtypeStruct((mask.sum(),), leaf.dtype))
            return jnp.asarray(dense)

        return node.replace(weight=_mapped(unpacked, node.weight), mask=jnp.asarray(mask))

    read = jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, weights.Masked))
    promised = json.loads(stored[_MANIFEST].tobytes()) if _MANIFEST in stored else {}
    check(promised, read, step=f"reading {path}")
    return read


def _own_bases(params: weights.Params) -> dict[str, Any]:
    """The bases that belong to one adapter alone, by path."""
    found = {}

    def one(place, node):
        if isinstance(node, weights.Lora) and node.own_base:
            found[f"{weights.path_name(place)}/base"] = node.base

    jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, weights.Lora))
    return found


def _packed(params) -> dict[str, np.ndarray]:
    """Every array by its path; of a masked array the kept values and the mask's bits."""
    written = {}

    def one(place, node):
        name = weights.path_name(place)
        if not isinstance(node, weights.Masked):
            written[name] = node
            return
        mask = np.asarray(node.mask)
        written[f"{name}/mask"] = np.packbits(mask)

        def inner(below, leaf):
            # What is not of the mask's shape, such as scales, belongs to kept and pruned values alike.
            leaf = np.asarray(leaf)
            written[f"{name}/weight{below}"] = leaf[mask] if leaf.shape == mask.shape else leaf

        _mapped(inner, node.weight)

    jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, weights.Masked))
    return written


def _mapped(f, w: Any) -> Any:
    """Maps f(path, array) over a weight's arrays; the path is '' for a plain array, or '/codes' and the like."""
    return jax.tree_util.tree_map_with_path(
        lambda place, leaf: f(f"/{weights.path_name(place)}" if place else "", leaf), w
    )


def _stored(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The name and the form in which an array is written: NumPy's file knows no types of 4 bits and no 8-bit floats."""
    named = f"{name}.{array.dtype.name}"
    if jax.dtypes.itemsize_bits(array.dtype) == 4:
        halves = np.pad(array.astype(np.uint8) & 15, [(0, 0)] * (array.ndim - 1) + [(0, array.shape[-1] % 2)])
        return named, halves[..., ::2] | halves[..., 1::2] << 4
    return (named, array.view(np.uint8)) if array.dtype == jnp.float8_e4m3fn else (name, array)


def _read(array: np.ndarray, like: jax.Array | jax.ShapeDtypeStruct) -> np.ndarray:
    """The inverse of `_stored`, for an array of the shape and dtype of `like`."""
    if jax.dtypes.itemsize_bits(like.dtype) == 4:
        codes = np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], -1)[..., : like.shape[-1]]
        signed = jnp.issubdtype(like.dtype, jnp.signedinteger)
        return ((codes.astype(np.int8) ^ 8) - 8 if signed else codes).astype(like.dtype)
    # NumPy's file forgets the name of a type that is not its own, and keeps its bytes.
    return array.view(like.dtype) if array.dtype.kind == "V" or like.dtype == jnp.float8_e4m3fn else array

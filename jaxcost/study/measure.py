"""What a set of weights costs once it is trained: bytes on disk, bytes in memory, work and speed of a decoded token."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import sharding, weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.data.files import atomic_write
from jaxcost.serving.engine import Engine
from jaxcost.transforms.manifest import check, manifest

_RUNS = 3
_MANIFEST = "manifest"


@dataclasses.dataclass(frozen=True)
class DecodeCost:
    """Decoding with a full batch, no prompt."""

    tokens_per_second: float
    """Measured, over all rows; the median of a few runs, compilation left out."""
    flops_per_token: float
    """Of the compiled program, attention over the whole cache included."""


def measure_decode(engine: Engine, params: weights.Params, *, batch_size: int, tokens: int) -> DecodeCost:
    """Decodes `tokens` tokens in each of `batch_size` rows."""
    config = engine.model.config
    tokens = min(tokens, config.max_length)

    def arguments():
        cache = engine.start(params, batch_size=batch_size, slots=tokens)
        logits = jnp.zeros((batch_size, config.vocab_size), jnp.float32)
        return params, logits, cache, jax.random.key(0), jnp.float32(1.0)

    decode = functools.partial(engine.decode, steps=tokens)
    compiled = engine.decode.lower(*arguments(), steps=tokens).compile()
    run = sharding.runnable(decode, compiled, params)
    seconds = []
    for _ in range(_RUNS + 1):
        args = jax.block_until_ready(arguments())
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - start)
    flops = compiled_cost(compiled).total_flops
    return DecodeCost(batch_size * tokens / statistics.median(seconds[1:]), flops / (batch_size * tokens))


def export(params: weights.Params, path: Path) -> int:
    """Writes what a user of these weights must store to one .npz file, by path; returns its bytes on disk.

    Beside a frozen base, which is stored once for all of its adapters, only what trains is written. Pruned weights
    are written as zeros, which the file's compression (deflate) then encodes. Codes of 4 bits are written two a byte,
    the first in the low half, along the last axis, and 8-bit floats as their bytes; the type ends the array's name, as
    in 'codes.int4'. What has invariants carries their manifest, as JSON. The same weights give the same bytes.
    """
    adapter_only = any(isinstance(w, weights.Frozen | weights.Lora) for w in _all(params))
    written = weights.partition(params)[0] if adapter_only else _flat(weights.map_weights(_zeroed, params))
    stored = dict(_stored(name, a) for name, a in jax.device_get(written).items())
    promised = manifest(params)
    if promised:
        stored[_MANIFEST] = np.frombuffer(json.dumps(promised, sort_keys=True).encode(), np.uint8)
    with atomic_write(path) as file:
        np.savez_compressed(file, **stored)
    return path.stat().st_size


def read_export(path: Path, params: weights.Params) -> weights.Params:
    """The weights that `export` wrote, verified against their manifest.

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

    def one(place, leaf):
        name = weights.path_name(place)
        found = stored.get(name, stored.get(f"{name}.{leaf.dtype.name}"))
        if found is not None:
            return jnp.asarray(_read(found, leaf))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{path} does not hold {name}; give the base that its adapters were trained on.")
        return leaf

    read = jax.tree_util.tree_map_with_path(one, params)
    promised = json.loads(stored[_MANIFEST].tobytes()) if _MANIFEST in stored else {}
    check(promised, read, step=f"reading {path}")
    return read


def weight_bytes(params: weights.Params) -> int:
    """Bytes of all arrays in memory, base, masks and scales included; codes of 4 bits two a byte, as on TPUs."""
    return sum(weights.storage_bytes(leaf) for leaf in jax.tree.leaves(params))


def trainable_parameters(params: weights.Params) -> int:
    """Numbers that train."""
    return sum(int(np.prod(leaf.shape)) for leaf in weights.partition(params)[0].values())


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


def _all(params):
    return jax.tree.leaves(params, is_leaf=weights.is_weight)


def _flat(params):
    return {weights.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _zeroed(_, w):
    def one(node):
        if isinstance(node, weights.Masked) and not isinstance(node.weight, weights.Weight):
            return node.replace(weight=node.materialize())
        return node

    return jax.tree.map(one, w, is_leaf=lambda node: isinstance(node, weights.Masked))

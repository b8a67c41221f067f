"""What a set of weights costs once it is trained: bytes on disk, bytes in memory, work and speed of a decoded token."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.data.files import atomic_write
from jaxcost.models.transformer import init_cache
from jaxcost.serving.engine import Engine

_RUNS = 3


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
        cache = init_cache(config, batch_size, tokens, engine.model.execution.dtype)
        logits = jnp.zeros((batch_size, config.vocab_size), jnp.float32)
        return params, logits, cache, jax.random.key(0), jnp.float32(1.0)

    compiled = engine.decode.lower(*arguments(), steps=tokens).compile()
    seconds = []
    for _ in range(_RUNS + 1):
        args = jax.block_until_ready(arguments())
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    flops = compiled_cost(compiled).total_flops
    return DecodeCost(batch_size * tokens / statistics.median(seconds[1:]), flops / (batch_size * tokens))


def export(params: weights.Params, path: Path) -> int:
    """Writes what a user of these weights must store to one .npz file, by path; returns its bytes on disk.

    Beside a frozen base, which is stored once for all of its adapters, only what trains is written. A mask is
    written as bits, eight a byte and whole matrices one after the other, and beside it the kept values alone in that
    order; `unpacked` puts both together again. The file is compressed (deflate). The same weights give the same bytes.
    """
    adapter_only = any(isinstance(w, weights.Frozen | weights.Lora) for w in _all(params))
    written = weights.partition(params)[0] if adapter_only else _packed(params)
    with atomic_write(path) as file:
        np.savez_compressed(file, **jax.device_get(written))
    return path.stat().st_size


def unpacked(kept: np.ndarray, bits: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The values (zero where they are pruned) and the boolean mask of this shape that `export` wrote as two arrays."""
    mask = np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)
    dense = np.zeros(shape, kept.dtype)
    dense[mask] = kept
    return dense, mask


def weight_bytes(params: weights.Params) -> int:
    """Bytes of all arrays in memory, base, masks and scales included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def trainable_parameters(params: weights.Params) -> int:
    """Numbers that train."""
    return sum(int(np.prod(leaf.shape)) for leaf in weights.partition(params)[0].values())


def _all(params):
    return jax.tree.leaves(params, is_leaf=weights.is_weight)


def _packed(params) -> dict[str, np.ndarray]:
    """Every array by its path; of a masked array the kept values and the mask's bits."""
    written = {}

    def one(path, node):
        name = weights.path_name(path)
        if not isinstance(node, weights.Masked):
            written[name] = node
            return
        mask = np.asarray(node.mask)
        written[f"{name}/mask"] = np.packbits(mask)
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node.weight):
            leaf, below = np.asarray(leaf), weights.path_name(inner)
            # What is not of the mask's shape, such as scales, belongs to kept and pruned values alike.
            written[f"{name}/weight/{below}".rstrip("/")] = leaf[mask] if leaf.shape == mask.shape else leaf

    jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, weights.Masked))
    return written

"""Writing a model as a checkpoint that transformers loads, one tensor at a time.

Weights of any kind are written as the dense matrices that they mean: masks as zeros, factors multiplied, adapters
merged, codes as numbers. `compressed` writes codes as codes.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.data.files import atomic_folder
from jaxcost.models import families
from jaxcost.models.config import ModelConfig
from jaxcost.models.huggingface import compressed
from jaxcost.models.huggingface.fields import fields_of
from jaxcost.models.huggingface.layout import CONFIG, INDEX, SINGLE, Place, places, write_json
from jaxcost.models.huggingface.safetensors import Tensor, write
from jaxcost.models.stacks import STACKS, resized
from jaxcost.models.transformer import Transformer, abstract
from jaxcost.progress import byte_bar

Layout = Literal["dense", "compressed-tensors"]

SHARD_BYTES = 5_000_000_000


def save(
    folder: str | Path,
    config: ModelConfig,
    params: weights.Params,
    *,
    model_type: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    layout: Layout = "dense",
    extra: Mapping[str, Any] | None = None,
    files: Iterable[Path] = (),
    shard_bytes: int = SHARD_BYTES,
    quiet: bool = True,
) -> None:
    """Writes a folder with `config.json` and safetensors files, which appears only once it is whole.

    Args:
      folder: does not exist yet.
      config: of the model; sizes that transforms changed are taken from the weights.
      params: weights of any kinds.
      model_type: the family to write, such as `llama`; the first that has all of the model's options if not given.
      dtype: of the tensors that are not codes.
      layout: `dense`, or quantised weights as codes, as vLLM reads them; see `compressed`.
      extra: further fields of `config.json`, such as `eos_token_id`.
      files: to copy beside it, such as a tokenizer's.
      shard_bytes: the most that one file holds, if it holds several tensors.
      quiet: show no progress.

    Raises:
      UnsupportedModel: the family, or any, lacks an option of the model or has no place for a parameter, or the layout
        has none for a kind of weight; the sentence names it.
      ValueError: the folder exists, or layers were cut so that the model is none any more (see `resized`).
      OSError: the disk is full.
    """
    folder = Path(folder)
    config = resized(config, params)
    written = fields_of(config, model_type) | {"dtype": dtype} | dict(extra or {})
    source = Source(config, params, written)
    if layout == "compressed-tensors":
        tensors, written["quantization_config"] = compressed.tensors(source, jnp.dtype(dtype))
    else:
        tensors = [source.dense(place, jnp.dtype(dtype)) for place in source.places.values()]
    shards = _shards(tensors, shard_bytes)
    total = sum(tensor.bytes for tensor in tensors)
    with atomic_folder(folder) as unfinished, byte_bar(f"writing {folder.name}", total, quiet) as advance:
        for name, shard in shards.items():
            write(unfinished / name, shard, advance)
        if len(shards) > 1:
            index = {tensor.name: name for name, shard in shards.items() for tensor in shard}
            write_json(unfinished / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        for file in files:
            shutil.copyfile(file, unfinished / file.name)
        write_json(unfinished / CONFIG, written)


class Source:
    """The tensors of a checkpoint, taken out of weights of any kinds."""

    def __init__(self, config: ModelConfig, params: weights.Params, fields: families.Fields):
        """Finds the place of every parameter; UnsupportedModel if one has none in checkpoints of the family."""
        self.parts = _parts(params)
        shapes = {weights.path_name(p): a.shape for p, a in jax.tree_util.tree_leaves_with_path(_dense(config))}
        family = families.family_of(fields)
        self.head = family.head_of(fields)
        found = places(family, self.head, config, shapes)
        placed = {path for place in found.values() for path in place.paths}
        homeless = sorted(set(self.parts) - placed)
        if homeless:
            raise families.UnsupportedModel(
                f"{homeless[0]} has no place in a {fields['model_type']} checkpoint; take it out of the weights first."
            )
        self.places = found

    def weight(self, path: str, index: Sequence[int]) -> Any:
        """The weight of one layer, and expert, of whatever kind it is; all of it for an empty index."""
        stacks = self.parts[path]
        if not index:
            return stacks[0][1]
        start, stack = next((start, w) for start, w in reversed(stacks) if start <= index[0])
        return _cut(stack, (index[0] - start, *index[1:]))

    def dense(self, place: Place, dtype) -> Tensor:
        """The tensor of a place, to be written as the numbers that it means."""

        def make():
            parts = [self.weight(path, place.index) for path in place.paths]
            return place.refolded(np.asarray(_joined(parts, place.transposed, jnp.dtype(dtype))))

        return Tensor(place.name, np.dtype(dtype), place.stored_shape, make)


def _dense(config: ModelConfig) -> weights.Params:
    return abstract(Transformer(config))[0]


def _parts(params: weights.Params) -> dict[str, list[tuple[int, Any]]]:
    """Path → the layers of its stacks, each with the number of its first one. What is not stacked has one part."""
    found: dict[str, list[tuple[int, Any]]] = {}
    start = 0
    for name in STACKS:
        if name in params:
            depth = jax.tree.leaves(params[name])[0].shape[0]
            weights.map_weights(
                lambda path, w: found.setdefault(f"layers/{path}", []).append((start, w)),  # noqa: B023
                params[name],
            )
            start += depth
    rest = {name: tree for name, tree in params.items() if name not in STACKS}
    weights.map_weights(lambda path, w: found.setdefault(path, []).append((0, w)), rest)
    return found


@jax.jit
def _cut(w: Any, index: tuple) -> Any:
    for i in index:
        w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), w)  # noqa: B023
    return w


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _joined(parts: Sequence[Any], transposed: bool, dtype) -> jax.Array:
    joined = jnp.concatenate([weights.materialize(w) for w in parts], axis=-1).astype(dtype)
    return joined.T if transposed else joined


def _shards(tensors: Sequence[Tensor], limit: int) -> dict[str, list[Tensor]]:
    """Files by name, each of several tensors that fit or of one."""
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}

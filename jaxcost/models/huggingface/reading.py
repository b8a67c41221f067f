"""Reading a checkpoint of transformers: one tensor at a time, straight into its place in the stacked parameters.

Every tensor is checked against the config before any is read. A parameter is an array on the devices from the start,
sharded as the mesh asks, into which each layer's tensor is written in place: the host holds no stack and no copy of the
model, at most the piece of a tensor that is read and, while it is turned round, a second one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcost import sharding, weights
from jaxcost.models import families
from jaxcost.models.config import ModelConfig
from jaxcost.models.huggingface import layout, safetensors
from jaxcost.models.huggingface.layout import CONFIG, INDEX, SINGLE, BadCheckpoint, Place, read_json
from jaxcost.models.transformer import Transformer, abstract
from jaxcost.progress import byte_bar

_PICKLED = ("*.bin", "*.pt*", "*.pkl", "*.ckpt")
"""Files that are pickles, which nothing here opens."""
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|embeddings\.position_ids$")
"""Constants that older checkpoints keep beside the weights."""


def load(
    folder: str | Path, dtype: str = "float32", mesh: Mesh | None = None, quiet: bool = True
) -> tuple[ModelConfig, weights.Params]:
    """The config and the parameters of a checkpoint.

    Args:
      folder: holds `config.json` and one or several safetensors files.
      dtype: dtype of the parameters.
      mesh: where they live, by the rules of `sharding`; the first device if it is not given.
      quiet: show no progress.

    Raises:
      BadCheckpoint: files or tensors are missing, extra, cut off or of another shape than the config says; the
        sentence names the tensor and the file.
      UnsupportedModel: the family or an option of it is not one of ours.
      ValueError: the parameters do not divide the mesh.
    """
    checkpoint = open_checkpoint(folder)
    return checkpoint.config, read(checkpoint, dtype, mesh, quiet)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder that has every tensor that its config asks for, in its shape, and no other; none is read yet."""

    folder: Path
    config: ModelConfig
    places: Mapping[str, Place]
    """By a tensor's name."""
    stored: Mapping[str, safetensors.Stored]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Checks all that can be checked without reading weights; raises as `load` does."""
    folder = Path(folder)
    fields, config = _read_config(folder)
    family, head = families.family_of(fields), families.family_of(fields).head_of(fields)
    stored = _read_headers(folder, family, head, config)
    layers = config.num_layers + config.encoder.num_layers
    if layers > len(stored):
        raise BadCheckpoint(
            f"{folder} holds {len(stored)} tensors, too few for the {layers} layers that its config.json says."
        )
    config = _untied(config, family, head, stored)
    params, _ = abstract(Transformer(config))
    shapes = {weights.path_name(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(params)}
    places = layout.places(family, head, config, shapes)
    _check(places, stored, config, head, folder)
    return Checkpoint(folder, config, places, stored)


def read(checkpoint: Checkpoint, dtype: str, mesh: Mesh | None, quiet: bool) -> weights.Params:
    """The parameters of a checkpoint; arguments and errors are those of `load`."""
    params, axes = abstract(Transformer(checkpoint.config))
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    shards = sharding.shardings(params, axes, mesh)
    homes = {weights.path_name(path): home for path, home in jax.tree_util.tree_leaves_with_path(shards)}
    shapes = {weights.path_name(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(params)}
    made = {path: jnp.zeros(shapes[path], dtype, device=home) for path, home in homes.items()}
    held = {name: checkpoint.stored[name] for name in checkpoint.places}
    with byte_bar(f"reading {checkpoint.folder.name}", sum(one.bytes for one in held.values()), quiet) as advance:
        for name, place in checkpoint.places.items():
            _fill(made, place, held[name], homes)
            advance(held[name].bytes)
    return jax.tree_util.tree_map_with_path(lambda path, _: made[weights.path_name(path)], params)


def _read_config(folder: Path) -> tuple[families.Fields, ModelConfig]:
    """What a folder's `config.json` holds, and the config that it describes."""
    path = folder / CONFIG
    fields = read_json(path)
    if "quantization_config" in fields:
        how = fields["quantization_config"]
        method = how.get("quant_method", "an unknown method") if isinstance(how, dict) else "an unknown method"
        raise families.UnsupportedModel(
            f"{path} says that the weights are quantised ({method}); give the checkpoint that it was made from, and "
            "quantise that here."
        )
    try:
        return fields, families.config_of(fields)
    except families.UnsupportedModel as error:
        raise families.UnsupportedModel(f"{path}: {error}") from error
    except ValueError as error:
        raise BadCheckpoint(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise BadCheckpoint(f"{path} lacks a field or holds one of the wrong kind ({error}); write it anew.") from error


def _read_headers(
    folder: Path, family: families.Family, head: families.Head, config: ModelConfig
) -> dict[str, safetensors.Stored]:
    """All tensors of a folder by the names of the family's table.

    A checkpoint of a model without its head has names without the first part, which is put before them, and an older
    one may have other ends of names.
    """
    index = _read_index(folder)
    headers = {file: _read_header(folder / file) for file in sorted(set(index.values())) or [SINGLE]}
    found = {name: one for header in headers.values() for name, one in header.items()}
    for name, file in index.items():
        if name in headers[file]:
            found[name] = headers[file][name]
        elif not _NOT_WEIGHTS.search(name):
            raise BadCheckpoint(f"{folder / file} lacks {name}, which {INDEX} says that it holds.")
    for old, new in family.renamed.items():
        found = {name.removesuffix(old) + new if name.endswith(old) else name: one for name, one in found.items()}
    starts = [template.partition(".")[0] for template in (*family.tensors, *family.further(config))]
    if any(name.partition(".")[0] in starts for name in found):
        return found
    return {name if name in head.tensors else f"{starts[0]}.{name}": tensor for name, tensor in found.items()}


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor's name, as an index says; empty where there is none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise BadCheckpoint(f"{path} has no weight_map.")
    strange = sorted(file for file in index.values() if not re.fullmatch(r"[^/\\]+\.safetensors", file))
    if strange:
        raise BadCheckpoint(f"{path} names {strange[0]}, but only safetensors files in its own folder are read.")
    return index


def _read_header(path: Path) -> dict[str, safetensors.Stored]:
    if not path.is_file():
        pickled = any(any(path.parent.glob(end)) for end in _PICKLED)
        hint = "; its pickle files are not read, so save it again with safetensors" if pickled else ""
        raise BadCheckpoint(f"There is no {path}{hint}.")
    try:
        return safetensors.read_header(path)
    except ValueError as error:
        raise BadCheckpoint(str(error)) from error


def _untied(
    config: ModelConfig, family: families.Family, head: families.Head, stored: Mapping[str, safetensors.Stored]
) -> ModelConfig:
    """The config, without tied embeddings where the checkpoint holds an unembedding that is another matrix."""
    table = {**family.tensors, **family.further(config)}
    [embedding] = [name for name, paths in table.items() if paths == ("embed/table",)] or [""]
    for name in set(head.tied) & set(stored) if config.tie_embeddings and embedding in stored else ():
        pair = stored[name], stored[embedding]
        same = pair[0].shape == pair[1].shape and all(
            np.array_equal(one, other) for one, other in zip(*(each.read() for each in pair), strict=True)
        )
        if head.tensors.get(name) == ("unembed/kernel",) and not same:
            return dataclasses.replace(config, tie_embeddings=False)
    return config


def _check(
    places: Mapping[str, Place],
    stored: Mapping[str, safetensors.Stored],
    config: ModelConfig,
    head: families.Head,
    folder: Path,
) -> None:
    missing = sorted(set(places) - set(stored))
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        file = folder / (INDEX if (folder / INDEX).exists() else SINGLE)
        raise BadCheckpoint(f"{file} lacks {missing[0]}{more}, which a model of this config.json has.")
    spare = {*head.unused, *(head.tied if config.tie_embeddings else ())}
    extra = sorted(name for name in set(stored) - set(places) - spare if not _NOT_WEIGHTS.search(name))
    if extra:
        raise BadCheckpoint(f"{stored[extra[0]].path} has {extra[0]}, which a model of this config.json does not have.")
    for name, place in places.items():
        found = stored[name]
        if found.shape != place.stored_shape:
            raise BadCheckpoint(
                f"{found.path}: {name} has the shape {found.shape}, but config.json says {place.stored_shape}."
            )
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise BadCheckpoint(f"{found.path}: {name} holds {found.dtype} numbers; weights must be floating point.")


# ---- Arrays ----

_PIECE_BYTES = 16 * 2**20
"""Of a tensor that is on its way at a time, where it can be cut. Large pieces of several devices would stay behind in
the host's allocator, which keeps what each of its threads has freed."""


def _fill(
    made: dict[str, jax.Array], place: Place, stored: safetensors.Stored, homes: Mapping[str, NamedSharding]
) -> None:
    """Writes a tensor into the parameters that it holds."""
    ends = np.cumsum([shape[-1] for shape in place.shapes])
    for path, shape, end in zip(place.paths, place.shapes, ends, strict=True):
        home = homes[path]
        spec = (*home.spec, *(None,) * (made[path].ndim - len(home.spec)))[len(place.index) :]
        turn = slice(None, None, -1 if place.transposed else 1)
        here = NamedSharding(home.mesh, PartitionSpec(*spec[turn]))
        # Of a tensor that joins several parameters, this one's are along their last axis.
        own = (*(slice(0, size) for size in shape[:-1]), slice(end - shape[-1], end))[turn]
        for cut in _pieces(own, here, stored.dtype.itemsize):
            start = [piece.start - first.start for piece, first in zip(cut, own, strict=True)][turn]
            moved = _moved(stored, cut, here, place)
            made[path] = _writer(home, place.transposed)(made[path], moved, (*place.index, *start))
            # The next piece is read only when this one has left the host.
            made[path].block_until_ready()


def _pieces(own: tuple[slice, ...], here: NamedSharding, itemsize: int) -> list[tuple[slice, ...]]:
    """Parts of a tensor that are moved one by one, cut along the first axis that is whole on every device, if any."""
    shape = tuple(part.stop - part.start for part in own)
    whole = (size == on_device for size, on_device in zip(shape, here.shard_shape(shape), strict=True))
    axis = next((i for i, uncut in enumerate(whole) if uncut), None)
    if axis is None or not math.prod(shape):
        return [own]
    step = max(1, _PIECE_BYTES * shape[axis] // (math.prod(shape) * itemsize))
    starts = range(own[axis].start, own[axis].stop, step)
    return [(*own[:axis], slice(i, min(i + step, own[axis].stop)), *own[axis + 1 :]) for i in starts]


def _moved(stored: safetensors.Stored, cut: tuple[slice, ...], here: NamedSharding, place: Place) -> jax.Array:
    """A part of a tensor on the devices, of which each asks for its own part of the mapped file."""
    part = place.flattened(stored.read())[cut]

    def on_host(index):
        # JAX has no doubles.
        return np.asarray(part[index], np.float32 if part.dtype == np.float64 else part.dtype)

    return jax.make_array_from_callback(part.shape, here, on_host)


@functools.cache
def _writer(home: NamedSharding, transposed: bool):
    """A jitted (array, tensor, start) → the array with the tensor from there on, in the memory of the first."""

    def write(held, part, start):
        # Turned round on its way into place, a matrix takes twice the time on a CPU.
        part = lax.optimization_barrier(part.T) if transposed else part
        part = part.astype(held.dtype)
        return lax.dynamic_update_slice(held, part.reshape(*(1,) * (held.ndim - part.ndim), *part.shape), start)

    return jax.jit(write, donate_argnums=0, out_shardings=home)

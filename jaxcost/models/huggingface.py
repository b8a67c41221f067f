"""Checkpoints of transformers read as a config and parameters: a folder with `config.json` and safetensors files.

Each tensor is checked against the config before any is read, and read alone, straight into its place in the stacked
parameters. Nothing is ever unpickled.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.models import families, safetensors
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, abstract

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
"""Constants that older checkpoints keep beside the weights."""


class BadCheckpoint(ValueError):
    """A folder that is no checkpoint, or whose tensors are not those of its config."""


def load(folder: str | Path, dtype: str = "float32") -> tuple[ModelConfig, weights.Params]:
    """The config and the parameters of a checkpoint.

    Args:
        folder: holds `config.json` and one or several safetensors files.
        dtype: dtype of the parameters.

    Raises:
        BadCheckpoint: files or tensors are missing, extra, cut off or of another shape than the config says; the
            sentence names the tensor and the file.
        UnsupportedModel: the family or an option of it is not one of ours.
    """
    folder = Path(folder)
    fields = _json(folder / "config.json")
    family = families.family_of(fields)
    try:
        config = family.config(fields)
    except (KeyError, TypeError) as error:
        raise BadCheckpoint(f"{folder / 'config.json'} lacks or garbles {error}.") from error
    stored = _tensors(folder)
    params, _ = abstract(Transformer(config))
    shapes = {weights.path_name(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(params)}
    places = _places(family, config, shapes)
    _check(places, stored, family, config, shapes, folder)
    made = {path: np.empty(shape, jnp.dtype(dtype)) for path, shape in shapes.items()}
    for name, (paths, index) in places.items():
        value = stored[name].read()
        if _is_transposed(name, paths, family):
            value = value.T
        sizes = [shapes[path][-1] for path in paths]
        for path, part in zip(paths, np.split(value, np.cumsum(sizes)[:-1], axis=-1), strict=True):
            made[path][index] = part
    return config, jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(made[weights.path_name(path)]), params)


def _places(family: families.Family, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Name of every tensor that the config asks for → our paths, and the index in front of each."""
    places = {}
    for template, paths in family.tensors.items():
        if not set(paths) <= set(shapes):
            continue
        stacks = [("layer", config.num_layers), ("expert", config.experts)]
        stacks = [(axis, size) for axis, size in stacks if f"{{{axis}}}" in template]
        for index in itertools.product(*(range(size) for _, size in stacks)):
            names = {axis: i for (axis, _), i in zip(stacks, index, strict=True)}
            places[template.format(**names)] = (paths, index)
    return places


def _is_transposed(name: str, paths: tuple[str, ...], family: families.Family) -> bool:
    return paths[0].endswith("/kernel") and (family.transposed or name == "lm_head.weight")


def _check(places, stored, family, config, shapes, folder: Path) -> None:
    missing = sorted(set(places) - set(stored))
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise BadCheckpoint(f"{folder} lacks {missing[0]}{more}, which a model of its config.json has.")
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    extra = sorted(name for name in set(stored) - set(places) - tied if not _NOT_WEIGHTS.search(name))
    if extra:
        raise BadCheckpoint(f"{stored[extra[0]].path} has {extra[0]}, which a model of this config.json does not have.")
    for name, (paths, index) in places.items():
        each = [shapes[path][len(index) :] for path in paths]
        want = (*each[0][:-1], sum(shape[-1] for shape in each))
        want = want[::-1] if _is_transposed(name, paths, family) else want
        if stored[name].shape != want:
            raise BadCheckpoint(
                f"{stored[name].path}: {name} has the shape {stored[name].shape}, but config.json says {want}."
            )


def _tensors(folder: Path) -> dict[str, safetensors.Stored]:
    """All tensors of a folder, by name."""
    if (folder / INDEX).exists():
        mapping = _json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise BadCheckpoint(f"{folder / INDEX} has no weight_map.")
        files = sorted(set(mapping.values()))
    else:
        files = [SINGLE]
    found: dict[str, safetensors.Stored] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            hint = "; its pickle files are not read, so save it again with safetensors" if pickled else ""
            raise BadCheckpoint(f"There is no {path}{hint}.")
        try:
            found |= safetensors.read_header(path)
        except ValueError as error:
            raise BadCheckpoint(str(error)) from error
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} is JSON, but not an object.")
    return content

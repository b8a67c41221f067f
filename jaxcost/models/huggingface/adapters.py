"""Adapters of peft in and out: LoRA, rsLoRA and DoRA, a folder with `adapter_config.json` and one safetensors file.

A module of peft holds lora_A (r, in) and lora_B (out, r), and DoRA's lora_magnitude_vector (out,). Where one of theirs
is several of our matrices side by side (GPT-2's c_attn, Phi-3's qkv_proj), each of ours reads the same A and its own
rows of B; written, their factors stand side by side and on the diagonal, with a rank that is the sum of theirs.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.data.files import atomic_folder
from jaxcost.models import families
from jaxcost.models.config import ModelConfig
from jaxcost.models.huggingface import safetensors
from jaxcost.models.huggingface.fields import fields_of
from jaxcost.models.huggingface.layout import BadCheckpoint, Place, read_json, write_json
from jaxcost.models.huggingface.writing import Source
from jaxcost.weights import Dora, Frozen, Lora, column_norm, materialize

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start an adapter that leave the base as it is."""
_OTHERS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Options that change what an adapter computes, and that we do not have."""


Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None, float]
"""Of one matrix: a (in, r), b (r, out), DoRA's magnitude (out,) where there is one, and the scale."""
Adapter = Mapping[str, Mapping[tuple[int, ...], Parts]]
"""A parameter's path → the parts of its layers that have an adapter, by the index of the layer."""


def load_adapter(folder: str | Path, config: ModelConfig, params: weights.Params, model_type: str) -> weights.Params:
    """The weights with an adapter of peft on them, unmerged; whatever has none is frozen, as `lora` leaves it.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      config: of the model that the adapter was trained on.
      params: its weights; the base may be of any kind.
      model_type: its family, which names the modules.

    Raises what `read_adapter` does.
    """
    return put_adapter(params, read_adapter(folder, Source(config, params, fields_of(config, model_type)).places))


def read_adapter(folder: str | Path, places: Mapping[str, Place]) -> Adapter:
    """An adapter of peft, checked against the model that it is for, of which no weight is needed.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      places: of the model's tensors.

    Raises:
      BadCheckpoint: the folder is none, or a tensor is missing, extra, cut off or of another shape than the model's;
        the sentence names it and the file.
      UnsupportedModel: the adapter is no LoRA, or has an option that we do not have.
    """
    folder = Path(folder)
    options = read_json(folder / CONFIG)
    _check_options(folder / CONFIG, options)
    stored = _headers(folder)
    found: dict[str, dict[tuple[int, ...], Parts]] = collections.defaultdict(dict)
    for place in places.values():
        names = [f"{_PREFIX}{place.module}.{end}" for end in ("lora_A.weight", "lora_B.weight")]
        if place.paths[0].endswith("/kernel") and place.name.endswith(".weight") and set(names) & set(stored):
            names += [f"{_PREFIX}{place.module}.lora_magnitude_vector"] if options.get("use_dora") else []
            parts = _read_module(folder, [(name, stored.pop(name, None)) for name in names], place, options)
            for path, part in zip(place.paths, parts, strict=True):
                found[path][place.index] = part
    if stored:
        raise BadCheckpoint(f"{folder / WEIGHTS} has {min(stored)}, which fits no module of this model.")
    if not found:
        raise BadCheckpoint(f"{folder / WEIGHTS} holds no adapter.")
    return found


def put_adapter(params: weights.Params, adapter: Adapter) -> weights.Params:
    """The weights with an adapter on them, as `load_adapter` gives them."""

    def one(path, w):
        if path in adapter:
            return _adapted(w, adapter[path])
        return w if not any(jax.tree.leaves(weights.trainable(w))) else Frozen(w)

    return weights.map_weights(one, params)


def save_adapter(
    folder: str | Path, config: ModelConfig, params: weights.Params, model_type: str, base: str = ""
) -> None:
    """Writes the adapters of a tree of weights, without the base, as a folder that peft loads.

    Args:
      folder: does not exist yet.
      config: of the model.
      params: weights with adapters.
      model_type: the family that names the modules.
      base: name or folder of the base model, for peft to find it.

    Raises:
      UnsupportedModel: there is no adapter, or one where peft has none, or something else trains beside them.
      ValueError: the folder exists.
      OSError: the disk is full.
    """
    source = Source(config, params, fields_of(config, model_type))
    adapted = {path for path, stacks in source.parts.items() if any(_lora_of(w) is not None for _, w in stacks)}
    _check_alone(params, adapted)
    modules = {}
    for place in source.places.values():
        if adapted & set(place.paths):
            plain = place.paths[0].endswith("/kernel") and not place.folded
            if not plain or (config.experts and "/mlp/" in place.paths[0]):
                raise families.UnsupportedModel(f"peft has no module for the adapter of {place.paths[0]}.")
            modules[place.module] = _module(source, place)
    ranks = {module: len(a) for module, (a, _, _, _) in modules.items()}
    alphas = {module: scale * ranks[module] for module, (_, _, _, scale) in modules.items()}
    rank, alpha = (collections.Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    tensors = []
    for module, (a, b, magnitude, _) in modules.items():
        parts = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": magnitude}
        tensors += [
            safetensors.Tensor(f"{_PREFIX}{module}.{end}", value.dtype, value.shape, lambda value=value: value)
            for end, value in parts.items()
            if value is not None
        ]
    with atomic_folder(Path(folder)) as unfinished:
        safetensors.write(unfinished / WEIGHTS, tensors)
        write_json(
            unfinished / CONFIG,
            {
                "peft_type": "LORA",
                # What peft wraps round a task asks a model for more than its modules; any takes the plain wrapping.
                "task_type": "CAUSAL_LM" if config.language_model else None,
                "base_model_name_or_path": base,
                "r": rank,
                "lora_alpha": alpha,
                "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
                "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
                "target_modules": sorted(modules),
                "use_dora": any(magnitude is not None for _, _, magnitude, _ in modules.values()),
                "fan_in_fan_out": not families.FAMILIES[model_type].transposed,
                "lora_dropout": 0.0,
                "bias": "none",
                "inference_mode": True,
            },
        )


# ---- In ----


def _check_options(path: Path, options: Mapping[str, Any]) -> None:
    if options.get("peft_type") != "LORA":
        raise families.UnsupportedModel(f"{path}: the peft_type {options.get('peft_type')!r} is not LORA.")
    for name in _OTHERS:
        if options.get(name):
            raise families.UnsupportedModel(f"{path}: {name} is on, which adapters here do not have.")
    if options.get("bias", "none") != "none":
        raise families.UnsupportedModel(f"{path}: bias is {options['bias']!r}; biases do not train with adapters here.")
    start = options.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise families.UnsupportedModel(
            f"{path}: init_lora_weights is {start!r}, which changed the base; save the adapter with peft's "
            "path_initial_model_for_weight_conversion."
        )


def _headers(folder: Path) -> dict[str, safetensors.Stored]:
    path = folder / WEIGHTS
    if not path.is_file():
        hint = "; its pickle file is not read, so save it again with safetensors" if any(folder.glob("*.bin")) else ""
        raise BadCheckpoint(f"There is no {path}{hint}.")
    try:
        return safetensors.read_header(path)
    except ValueError as error:
        raise BadCheckpoint(str(error)) from error


def _read_module(
    folder: Path, tensors: list[tuple[str, safetensors.Stored | None]], place: Place, options: Mapping[str, Any]
) -> list[Parts]:
    """The parts of each matrix that a module holds side by side."""
    rank = _of_module(options.get("rank_pattern"), place.module, options.get("r", 8))
    alpha = _of_module(options.get("alpha_pattern"), place.module, options.get("lora_alpha", 8))
    if not (type(rank) is int and rank > 0 and isinstance(alpha, int | float)):
        raise BadCheckpoint(
            f"{folder / CONFIG} says that {place.module} has the rank {rank!r} and the lora_alpha {alpha!r}; they must "
            "be a whole number of at least 1 and a number."
        )
    sizes = [shape[-1] for shape in place.shapes]
    inward, outward = place.shapes[0][0], sum(sizes)
    read = []
    for (name, stored), shape in zip(tensors, ((rank, inward), (outward, rank), (outward,)), strict=False):
        if stored is None:
            raise BadCheckpoint(f"{folder / WEIGHTS} lacks {name}, which its {CONFIG} asks for.")
        if stored.shape != shape:
            raise BadCheckpoint(f"{stored.path}: {name} has the shape {stored.shape}, but must have {shape}.")
        read.append(np.asarray(stored.read(), np.float32))
    a, b, *magnitude = read
    cuts = np.cumsum(sizes)[:-1]
    magnitudes = np.split(magnitude[0], cuts) if magnitude else [None] * len(sizes)
    scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
    return [(a.T, part.T, m, scale) for part, m in zip(np.split(b, cuts), magnitudes, strict=True)]


def _of_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """What a pattern says of a module: its keys are the ends of modules' names, as regular expressions."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _adapted(w: Any, layers: Mapping[tuple[int, ...], Parts]) -> Any:
    """A stacked weight with the adapters of its layers; one that has none gets factors of zero."""
    base = _unfrozen(w)
    dense = jax.eval_shape(materialize, base).shape
    stack, (inward, outward) = dense[:-2], dense[-2:]
    rank, scale = max(a.shape[-1] for a, *_ in layers.values()), next(iter(layers.values()))[-1]
    a_all, b_all = np.zeros((*stack, inward, rank), np.float32), np.zeros((*stack, rank, outward), np.float32)
    has_magnitude = any(part[2] is not None for part in layers.values())
    magnitudes = np.array(column_norm(base)) if has_magnitude else None
    for index, (a, b, magnitude, own) in layers.items():
        a_all[index][:, : a.shape[-1]] = a
        b_all[index][: b.shape[-2]] = b * np.float32(own / scale)
        if has_magnitude:
            magnitudes[index] = magnitude
    adapted = Lora(base, jnp.asarray(a_all), jnp.asarray(b_all), scale)
    return Dora(adapted, jnp.asarray(magnitudes)) if has_magnitude else adapted


# ---- Out ----


def _unfrozen(w: Any) -> Any:
    return w.weight if isinstance(w, Frozen) else w


def _lora_of(w: Any) -> Lora | None:
    w = _unfrozen(w)
    inner = w.weight if isinstance(w, Dora) else w
    return inner if isinstance(inner, Lora) else None


def _check_alone(params: weights.Params, adapted: set[str]) -> None:
    beside = []

    def one(path, w):
        if path.removeprefix("frozen_") not in adapted and any(jax.tree.leaves(weights.trainable(w))):
            beside.append(path)
        lora = _lora_of(w)
        inner = lora.base if lora is not None else w
        for node in jax.tree.leaves(inner, is_leaf=lambda n: n is not inner and weights.is_weight(n)):
            if isinstance(node, Lora | Dora):
                raise families.UnsupportedModel(f"{path} has an adapter below something else; merge that one first.")

    weights.map_weights(one, params)
    if not adapted:
        raise families.UnsupportedModel("The weights have no adapter; apply lora() first, or write the whole model.")
    if beside:
        raise families.UnsupportedModel(
            f"{beside[0]} trains beside the adapters, and peft's file would leave it out; write the whole model."
        )


def _module(source: Source, place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """lora_A (r, in), lora_B (out, r), the magnitude (out,) where there is one, and the scale, of one module."""
    parts = [_unfrozen(source.weight(path, place.index)) for path in place.paths]
    loras = [_lora_of(w) for w in parts]
    scale = next(lora.scale for lora in loras if lora is not None)
    a_all, b_all = [], []
    for lora, (inward, outward) in zip(loras, place.shapes, strict=True):
        if lora is None:
            a, b = np.zeros((inward, 0), np.float32), np.zeros((0, outward), np.float32)
        else:
            a, b = (np.asarray(materialize(factor), np.float32) for factor in (lora.a, lora.b))
            b = b * np.float32(lora.scale / scale)
        a_all.append(a)
        b_all.append(b)
    magnitude = None
    if any(isinstance(w, Dora) for w in parts):
        each = [w.magnitude if isinstance(w, Dora) else column_norm(w) for w in parts]
        if any(lora is not None and not isinstance(w, Dora) for w, lora in zip(parts, loras, strict=True)):
            raise families.UnsupportedModel(f"The parts of {place.name} have LoRA and DoRA; adapt them alike.")
        magnitude = np.concatenate([np.asarray(m, np.float32) for m in each])
    return np.concatenate(a_all, axis=1).T, _diagonal(b_all).T, magnitude, scale


def _diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """The blocks on the diagonal of a matrix of zeros."""
    out = np.zeros(np.sum([block.shape for block in blocks], axis=0), np.float32)
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out

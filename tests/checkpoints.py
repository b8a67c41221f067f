"""Checkpoints as transformers writes them, made without it."""

import json

import jax
import numpy as np

from jaxcost import weights
from jaxcost.models import families
from jaxcost.models.huggingface import layout
from jaxcost.models.transformer import Transformer, abstract

FIELDS = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 6,
}


def tensors_of(fields, make=None):
    """Tensors of a config, by their names in a checkpoint: random, or make(number, shape)."""
    family, config = families.family_of(fields), families.config_of(fields)
    params = weights.map_weights(lambda path, a: a.shape, abstract(Transformer(config))[0])
    shapes = {
        weights.path_name(path): shape
        for path, shape in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, tuple))
    }
    rng = np.random.default_rng(0)
    tensors = {}
    for name, place in layout.places(family, family.head_of(fields), config, shapes).items():
        made = rng.normal(size=place.shape) if make is None else make(np.float32(0), place.shape)
        tensors[name] = place.refolded(made.astype(np.float32, copy=False))
    return tensors


def write(folder, fields, tensors, cut=0, dtype="F32"):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content[: len(content) - cut])
    (folder / "config.json").write_text(json.dumps(fields))

"""A checkpoint of transformers as a training's folder, from which every script goes on, and back.

An imported folder looks like a training of no steps: the experiment with the checkpoint's model, its tokenizer, its
weights as checkpoint 0, and in `huggingface/` the files that go back with it. Both ways the result appears only when it
is whole.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import jax

from jaxcost import serialization, sharding, weights
from jaxcost.config import Experiment
from jaxcost.data import DataConfig
from jaxcost.data.files import atomic_folder, check_free
from jaxcost.data.pretrained import FILES, PretrainedTokenizer, read_tokenizer, write_tokenizer
from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.models import huggingface
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.huggingface import adapters, hub, layout, reading
from jaxcost.models.huggingface.fields import fields_of
from jaxcost.models.huggingface.writing import Layout
from jaxcost.session import load_run
from jaxcost.training.checkpoints import Checkpoints
from jaxcost.training.config import CheckpointConfig
from jaxcost.transforms import lora, rule
from jaxcost.transforms.base import Rule
from jaxcost.transforms.manifest import manifest
from jaxcost.weights import Dora, Lora
from jaxcost.workdir import DESCRIPTION, TOKENIZER

KEPT = "huggingface"
"""The folder that holds what a checkpoint came with."""
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
_LABELS = ("id2label", "label2id", "problem_type")
_IMAGES = "preprocessor_config.json"
"""How images or audio are made ready, which comes with a checkpoint of theirs."""


def import_checkpoint(
    source: str | Path,
    directory: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    adapter: str | Path | None = None,
    merge: bool = False,
    quiet: bool = False,
) -> Experiment:
    """Makes a training's folder of a checkpoint, and of an adapter of peft on it; returns its experiment.

    Args:
      source: a folder, or a name on the hub. A model of images or audio needs no tokenizer; its training has that of
        bytes.
      directory: the folder to make.
      dtype: of weights and arithmetic.
      adapter: folder, or name on the hub, of an adapter.
      merge: add the adapter to the weights, for good, instead of keeping it beside them.
      quiet: show no progress.

    Raises:
      BadCheckpoint, BadTokenizer: what was given is none; the sentence names the file and the tensor.
      UnsupportedModel: the model or the adapter has an option that is not one of ours.
      ValueError: the folder exists.
    """
    check_free(directory)
    folder = hub.locate(source)
    checkpoint = reading.open_checkpoint(folder)
    config = checkpoint.config
    tokenizer = ByteTokenizer() if not config.of_tokens else read_tokenizer(folder)
    added = None if adapter is None else adapters.read_adapter(hub.locate(adapter), checkpoint.places)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=-1), jax.devices()[: math.gcd(config.width, len(jax.devices()))])
    params = reading.read(checkpoint, dtype, mesh, quiet)
    transforms = ()
    if added is not None:
        params = adapters.put_adapter(params, added)
        if merge:
            params = weights.merge(params)
        else:
            transforms = (lora(rules=_rules(params)),)
    experiment = Experiment(
        model=config,
        data=DataConfig(sequence_length=min(DataConfig.sequence_length, config.max_length)),
        execution=ExecutionConfig(compute=dtype, weights=dtype),
        transforms=transforms,
    )
    with atomic_folder(directory) as unfinished:
        kept = unfinished / KEPT
        kept.mkdir()
        for name in (layout.CONFIG, _IMAGES, *FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, kept / name)
        tokenizer.save(unfinished / TOKENIZER)
        with Checkpoints(unfinished / "checkpoints", CheckpointConfig()) as checkpoints:
            checkpoints.save(0, {"params": params}, {"manifest": manifest(params)}, donated=False)
        (unfinished / DESCRIPTION).write_text(json.dumps(serialization.to_json(experiment), indent=1))
    return experiment


def export_run(
    directory: Path,
    folder: Path,
    *,
    model_type: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    layout: Layout = "dense",
    adapter_only: bool = False,
    quiet: bool = False,
) -> str:
    """Writes a training's newest weights as a checkpoint of transformers, tokenizer included; returns its model_type.

    Args:
      directory: the training's folder.
      folder: the folder to make.
      model_type: the family to write; that of the checkpoint that was imported, or else the first that can.
      dtype: of what is not quantised.
      layout: `dense`, or quantised weights as codes.
      adapter_only: write the adapters alone, for peft.
      quiet: show no progress.

    Raises:
      UnsupportedModel: the family, or any, lacks an option of the model; the sentence names it.
      CheckpointError: the training has no checkpoint, or a damaged one.
      ValueError: the directory holds no training, or the folder exists.
    """
    check_free(folder)
    session, params, _ = load_run(directory, jax.devices()[:1])
    config, kept = session.model.config, Path(directory) / KEPT
    extra = {}
    if kept.is_dir():
        before = json.loads((kept / "config.json").read_text())
        model_type = model_type or before["model_type"]
        names = (*_SPECIAL, *(_LABELS if len(before.get("id2label") or ()) == config.head.labels else ()))
        extra = {name: before[name] for name in names if name in before}
    if session.experiment.data.one_answer:
        regression = session.experiment.data.objective == "regression"
        extra["problem_type"] = "regression" if regression else "single_label_classification"
    model_type = fields_of(config, model_type)["model_type"]
    if adapter_only:
        huggingface.save_adapter(folder, config, params, model_type)
        return model_type
    with tempfile.TemporaryDirectory() as made:
        if isinstance(session.tokenizer, PretrainedTokenizer) or not config.of_tokens:
            files = [path for name in (_IMAGES, *FILES) if (path := kept / name).is_file()]
        else:
            extra |= write_tokenizer(session.tokenizer, Path(made))
            files = list(Path(made).iterdir())
        options = {"model_type": model_type, "dtype": dtype, "layout": layout, "extra": extra}
        huggingface.save(folder, config, params, files=files, quiet=quiet, **options)
    return model_type


def labels_of(directory: Path, count: int) -> tuple[tuple[str, ...], bool] | None:
    """The names of a model's labels by number, and whether a text may have several of them.

    Args:
      directory: of a training or of what `import_checkpoint` made.
      count: labels that the model tells.

    Returns:
      None where no checkpoint came with names of so many.
    """
    path = Path(directory) / KEPT / "config.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    names = fields.get("id2label") or {}
    if set(names) != {str(i) for i in range(count)}:
        return None
    several = fields.get("problem_type") == "multi_label_classification"
    return tuple(str(names[str(i)]) for i in range(count)), several


def _rules(params: weights.Params) -> tuple[Rule, ...]:
    """The rules with which `lora` puts adapters where a tree of weights has them."""
    rules = []

    def one(path, w):
        inner = w.weight if isinstance(w, Dora) else w
        if isinstance(inner, Lora):
            rank = inner.a.shape[-1]
            rules.append(rule(f"^{path}$", rank=rank, alpha=inner.scale * rank, dora=isinstance(w, Dora)))

    weights.map_weights(one, params)
    return tuple(rules)

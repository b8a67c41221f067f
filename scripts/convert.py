"""Converts a checkpoint of transformers to a training's folder, from which every script goes on, or back."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Convert SOURCE to TARGET: a training's folder to a checkpoint of transformers, anything else the other way."""

    source: Positional[str]
    """Folder of a training (the --workdir of train.py), or a checkpoint: its folder, or its name on the hub."""
    target: Positional[Path]
    """Folder to make."""
    adapter: str | None = None
    """In: an adapter of peft to put on the checkpoint, a folder or a name on the hub."""
    merge: bool = False
    """In: add the adapter to the weights for good."""
    adapter_only: bool = False
    """Out: write the adapters alone, for peft."""
    model_type: str | None = None
    """Out: the family to write, such as llama; by default that of the checkpoint, or the first that fits."""
    layout: Literal["dense", "compressed-tensors"] = "dense"
    """Out: all weights as numbers, or quantised ones as codes, as vLLM reads them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the numbers; float16 goes out only."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Converts, says what to do next and returns what was made."""
    from jaxcost.conversion import export_run, import_checkpoint
    from jaxcost.workdir import DESCRIPTION

    a = arguments
    result = {"schema": "jaxcost-convert-1", "source": a.source, "target": str(a.target), "dtype": a.dtype}
    if (Path(a.source) / DESCRIPTION).is_file():
        if a.adapter or a.merge:
            raise ValueError("--adapter and --merge are for checkpoints, and SOURCE is a training; leave them out.")
        options = {"model_type": a.model_type, "dtype": a.dtype, "layout": a.layout, "adapter_only": a.adapter_only}
        result |= {"direction": "out", "model_type": export_run(Path(a.source), a.target, **options)}
        loads = "peft's PeftModel" if a.adapter_only else f"transformers' {_class_of(a.target)}"
        print(f"{a.target} holds a {result['model_type']} model for {loads}.from_pretrained")
        return result
    if a.dtype == "float16" or a.model_type or a.layout != "dense" or a.adapter_only:
        raise ValueError(
            "--dtype float16, --model-type, --layout and --adapter-only are for the way out, and SOURCE is no "
            "training; leave them out."
        )
    if a.merge and not a.adapter:
        raise ValueError("--merge needs an --adapter.")
    experiment = import_checkpoint(a.source, a.target, dtype=a.dtype, adapter=a.adapter, merge=a.merge)
    m = experiment.model
    following = f"; next: python scripts/generate.py {a.target}" if m.generates else ""
    print(f"{a.target} holds {m.num_layers} layers of width {m.width}{following}")
    return result | {"direction": "in", "layers": m.num_layers, "width": m.width, "vocab_size": m.vocab_size}


def _class_of(folder: Path) -> str:
    """The class of transformers that a checkpoint is of."""
    return json.loads((folder / "config.json").read_text())["architectures"][0]


if __name__ == "__main__":
    run(main, Arguments)

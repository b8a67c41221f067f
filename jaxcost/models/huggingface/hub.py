"""A checkpoint's folder: one on this machine, or one fetched from the Hugging Face hub by its name."""

from __future__ import annotations

import re
from pathlib import Path

from jaxcost.models.huggingface.layout import BadCheckpoint

WANTED = ("*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt")
"""What is fetched: weights, configs, tokenizers, templates. Pickle files are not."""
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint, which is fetched, or taken from the hub's cache, if it is none of this machine's.

    Raises:
      BadCheckpoint: there is no such folder, and no checkpoint of that name can be fetched.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not _NAME.fullmatch(str(source)):
        raise BadCheckpoint(f"There is no folder {source}; give one, or a name on the hub such as Qwen/Qwen3-0.6B.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(WANTED)))
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise BadCheckpoint(
            f"{source} is no folder here and could not be fetched from the hub ({said}); without a network, give the "
            "folder of a copy."
        ) from error

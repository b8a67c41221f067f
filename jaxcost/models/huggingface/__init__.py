"""Checkpoints of Hugging Face in and out: models of transformers, adapters of peft, and quantised weights for vLLM.

A checkpoint is a folder with `config.json` and safetensors files. `families` says what a config means and where each
tensor goes; here are the reader and the writer that follow it, one tensor at a time. Nothing is ever unpickled.
"""

from jaxcost.models.huggingface.adapters import load_adapter, save_adapter
from jaxcost.models.huggingface.layout import BadCheckpoint
from jaxcost.models.huggingface.reading import load
from jaxcost.models.huggingface.writing import save

__all__ = ["BadCheckpoint", "load", "load_adapter", "save", "save_adapter"]

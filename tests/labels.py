"""Texts with labels and answers, and small models that learn them."""

import dataclasses
import json

import jax
import numpy as np

from jaxcost.config import Experiment
from jaxcost.data import DataConfig
from jaxcost.models import families
from jaxcost.models.config import HeadConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.session import Session
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig

ENCODER = ModelConfig(
    vocab_size=0, width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64, causal=False
)
LABELS = dataclasses.replace(ENCODER, head=HeadConfig(outputs=3, pooling="mean"))
BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_labels": 1}
BERT |= {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NUMBER = families.config_of(BERT | {"intermediate_size": 64, "max_position_embeddings": 16})
NUMBERS = {"red": -1.5, "green": 0.25, "blue": 2.0}


def write_folder(root):
    """Writes texts whose first word tells the label, the number and the answer, and returns the folder."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 120), ("validation", 30)):
        with open(root / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                word = str(draw.choice(["red", "green", "blue"]))
                text = f"{word} {''.join(draw.choice(list('xyz '), 6))}"
                record = {"text": text, "label": word, "number": NUMBERS[word], "answer": word.upper()}
                file.write(json.dumps(record) + "\n")
    return root


def experiment(folder, model, objective, **changes):
    data = DataConfig(
        sources=(str(folder),), objective=objective, sequence_length=16, batch_size=16, cache_dir=str(folder / "cache")
    )
    settings = {
        "model": model,
        "data": dataclasses.replace(data, **changes.pop("data", {})),
        "execution": ExecutionConfig(unroll="never"),
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "training": TrainingConfig(steps=40, evaluate_every=20),
        "checkpoint": CheckpointConfig(every_steps=20),
    }
    return Experiment(**settings | changes)


def session_of(value):
    return Session(value, quiet=True, devices=jax.devices()[:1])

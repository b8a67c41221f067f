"""What a customer wants, from 500 labelled messages: ten intents, a small encoder trained from new weights.

Messages have typing errors, paraphrases, hedging, and what the customer does not want. The data are synthetic: a
grammar makes them (`jaxcost/data/synthetic.py`), so that they need no network, and figures on them say little of any
other data. With a network, `--data.name huggingface:banking77` is Banking77, of people (Casanueva et al. 2020,
arXiv:2003.04807), with 77 labels for `--model.head.outputs`. `--data.train-split train` has all labels.
"""

from jaxcost.config import (
    CheckpointConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from jaxcost.data.augmentation import AugmentConfig
from jaxcost.models.config import HeadConfig

experiment = Experiment(
    model=ModelConfig(
        vocab_size=0,
        width=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        mlp_width=128,
        max_length=64,
        causal=False,
        head=HeadConfig(outputs=10, pooling="mean", bias=True),
    ),
    data=DataConfig(
        name="synthetic_customer_service",
        train_split="train[:500]",
        objective="labels",
        augment=AugmentConfig(synonyms=0.3, keyboard=0.02),
        tokenizer="bpe",
        bpe_vocab_size=512,
        sequence_length=48,
        batch_size=32,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    training=TrainingConfig(steps=400, evaluate_every=100),
    checkpoint=CheckpointConfig(every_steps=200),
)

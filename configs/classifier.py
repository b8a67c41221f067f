"""A small encoder that tells what a customer wants, and six ways to make it cheaper to serve.

Trains a tenth of a million parameters from new weights for 400 steps on 4,000 labelled messages, then puts each recipe
through the same 50 steps of recovery. The data are synthetic (`jaxcost/data/synthetic.py`), so that nothing is
downloaded and no label was paid for; figures on them say little of any other data. With labels of people, give what one
of them cost as `--prices.label-usd`. `--study.spaces` searches in the place of the list; see configs/search.py.
"""

from jaxcost.config import (
    CheckpointConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from jaxcost.cost.purchases import PriceConfig
from jaxcost.models.config import HeadConfig
from jaxcost.study.recipes import Budget, Recipe, StudyConfig
from jaxcost.training.distill import DistillConfig
from jaxcost.transforms import factorize, lora, prune, quantize

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
        objective="labels",
        tokenizer="bpe",
        bpe_vocab_size=512,
        sequence_length=48,
        batch_size=32,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    training=TrainingConfig(steps=400, evaluate_every=200),
    checkpoint=CheckpointConfig(every_steps=200),
    prices=PriceConfig(label_usd=0.0),
    study=StudyConfig(
        recovery_steps=50,
        recovery_learning_rate=1e-3,
        recipes=(
            Recipe("prune_70", transforms=(prune(sparsity=0.7),)),
            Recipe(
                "prune_70_taught",
                transforms=(prune(sparsity=0.7),),
                distill=DistillConfig(logits=1.0, labels=0.5, temperature=2.0),
            ),
            Recipe("low_rank", transforms=(factorize(parameters=0.5),)),
            Recipe("int8_weights", finish=(quantize(),)),
            Recipe("int4_weights", finish=(quantize(bits=4),)),
            Recipe("lora", transforms=(lora(rank=4),)),
        ),
        budgets=(
            Budget("half of the bytes in memory", "weight_bytes", 0.5),
            Budget("60 % of the FLOPs of a request", "inference_flops_per_request", 0.6),
        ),
    ),
)

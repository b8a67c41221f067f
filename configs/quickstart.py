"""A small transformer on the text of Python's own standard library, and seven ways to make it cheaper.

Trains 2.2 million parameters for 450 steps, then puts each recipe through the same 50 steps of recovery.
"""

from jaxcost.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from jaxcost.study.recipes import Recipe, StudyConfig
from jaxcost.transforms import factorize, lora, prune, quantize

experiment = Experiment(
    model=ModelConfig(vocab_size=0, width=192, num_layers=4, num_heads=3, num_kv_heads=3, head_dim=64, mlp_width=512),
    data=DataConfig(
        name="python_text/library", tokenizer="bpe", bpe_vocab_size=1024, batch_size=8, sequence_length=256
    ),
    execution=ExecutionConfig(compute="bfloat16"),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="wsd", warmup_steps=20, decay_fraction=0.5),
    training=TrainingConfig(steps=450, evaluate_every=150),
    evaluation=EvaluationConfig(max_tokens=65_536),
    checkpoint=CheckpointConfig(every_steps=150),
    study=StudyConfig(
        recovery_steps=50,
        recovery_learning_rate=1e-3,
        shifted_data="python_text/reference",
        recipes=(
            Recipe("control"),
            Recipe("prune_50", transforms=(prune(sparsity=0.5),)),
            Recipe("prune_2_4", transforms=(prune(pattern="2:4"),)),
            Recipe("low_rank", transforms=(factorize(parameters=0.5),)),
            Recipe("int8_weights", finish=(quantize(),)),
            Recipe("int8_trained", transforms=(quantize(mode="training"),), finish=(quantize(),)),
            Recipe("full_fine_tune", task="shifted"),
            Recipe("lora", transforms=(lora(rank=4, alpha=8),), task="shifted", learning_rate=1e-2),
        ),
    ),
)

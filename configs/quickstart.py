"""A small transformer on the text of Python's own standard library, and six ways to make it cheaper.

Trains 3.7 million parameters for 420 steps, then puts each recipe through the same 32 steps of recovery. The learning
rates of the two recipes on the shifted domain were swept, each for itself (full: 1.5e-3 to 3e-3; LoRA: 8e-3 to 1.2e-2),
on the scores that the report shows.
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
from jaxcost.study.recipes import Budget, Recipe, StudyConfig
from jaxcost.transforms import factorize, lora, prune, quantize, rule

ADAPTED = (rule("(query|key)/", skip=True), rule("(kernel|table)$"))

experiment = Experiment(
    model=ModelConfig(vocab_size=0, width=256, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=64, mlp_width=1024),
    data=DataConfig(
        name="python_text/library", tokenizer="bpe", bpe_vocab_size=1024, batch_size=8, sequence_length=256
    ),
    execution=ExecutionConfig(compute="bfloat16"),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="wsd", warmup_steps=20, decay_fraction=0.5),
    training=TrainingConfig(steps=420, evaluate_every=140),
    evaluation=EvaluationConfig(max_tokens=65_536),
    checkpoint=CheckpointConfig(every_steps=140),
    study=StudyConfig(
        recovery_steps=32,
        recovery_learning_rate=3e-4,
        shifted_data="python_text/reference",
        budgets=(
            Budget("the control's price, give or take a tenth", "usd", 1.1),
            Budget("a third of the bytes on disk", "checkpoint_bytes", 1 / 3),
            Budget("60 % of the FLOPs of a decoded token", "inference_flops_per_token", 0.6),
        ),
        recipes=(
            Recipe("control"),
            Recipe("prune_50", transforms=(prune(sparsity=0.5),)),
            Recipe("prune_2_4", transforms=(prune(pattern="2:4"),)),
            Recipe("low_rank", transforms=(factorize(parameters=0.5),)),
            Recipe("int8_weights", finish=(quantize(),)),
            Recipe("int8_trained", transforms=(quantize(mode="training"),), finish=(quantize(),)),
            Recipe("full_fine_tune", task="shifted", learning_rate=2e-3),
            Recipe(
                "lora",
                # The embeddings have adapters too, and the norms train whole: the shifted domain is another language.
                # Queries and keys have none: at equal bytes, the rank is worth more elsewhere.
                transforms=(lora(rank=9, alpha=36, rules=ADAPTED, train="norm"),),
                task="shifted",
                learning_rate=8e-3,
            ),
        ),
    ),
)

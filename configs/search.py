"""The quickstart's task with a smaller model, and a space of 60 recipes to search at a quarter of the grid's cost.

Trains 0.2 million parameters for 150 steps; then recipes recover for up to 24 steps, at rates over two orders of
magnitude. Wanted is the best score with no more than 60 % of the bytes in memory, which 36 of them meet.
`scripts/benchmarks/search_against_grid.py` sets what the search finds against all of these.
"""

from jaxcost.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from jaxcost.study.recipes import Budget, SearchConfig, StudyConfig
from jaxcost.study.space import Choice, Range, Space, each
from jaxcost.transforms import factorize, prune, quantize

CUTS = (
    None,
    *each(prune, sparsity=Choice((0.3, 0.5, 0.7, 0.8))),
    prune(pattern="2:4"),
    *each(factorize, parameters=Choice((0.4, 0.6))),
)

experiment = Experiment(
    model=ModelConfig(
        vocab_size=0, width=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, mlp_width=256, max_length=128
    ),
    data=DataConfig(name="python_text/library", tokenizer="bpe", bpe_vocab_size=512, batch_size=8, sequence_length=128),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="wsd", warmup_steps=20),
    training=TrainingConfig(steps=150),
    evaluation=EvaluationConfig(max_tokens=16_384),
    checkpoint=CheckpointConfig(every_steps=150),
    study=StudyConfig(
        recovery_steps=24,
        recovery_learning_rate=3e-3,
        decode_tokens=16,
        spaces=(
            Space(
                transforms=(Choice(CUTS),),
                finish=(Choice((None, quantize())),),
                learning_rate=Range(1e-4, 1e-2, 4, log=True),
            ),
        ),
        search=SearchConfig(rungs=(0.25, 0.5, 1.0), keep=0.4),
        budgets=(
            Budget("a quarter of the grid's FLOPs", "flops", share=0.25, of="study"),
            Budget("60 % of the bytes in memory", "weight_bytes", share=0.6),
        ),
    ),
)

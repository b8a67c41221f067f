"""SASRec for the 3416 items of MovieLens-1M: 212 thousand parameters, histories of up to 200 items.

Kang and McAuley 2018, arXiv:1808.09781, with the sizes of its section IV. Its blocks are those of the authors' code,
which the published figures come from: the stream itself is normed, and keys and values are of what it was before. The
paper's formula g(x) = x + f(LayerNorm(x)) is `norm_placement="pre"`. Biases and the projection out of the attention
are those of the reimplementations with torch's own attention. Items are tokens, 0 of them the padding, which stands
behind a history and is left out by `valid`. There is no dropout.

There are no interactions among the data that come with jaxcost: `plan.py` says what a step costs, and `train.py` learns
the bytes of a text as if they were items, by the full softmax instead of a sampled loss.
"""

from jaxcost.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, TrainingConfig

experiment = Experiment(
    model=ModelConfig(
        vocab_size=3417,
        width=50,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=50,
        mlp_width=50,
        gated=False,
        activation="relu",
        norm="layer",
        norm_placement="stream",
        norm_epsilon=1e-8,
        position="learned",
        max_length=200,
        tie_embeddings=True,
        scale_embeddings=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    data=DataConfig(batch_size=128, sequence_length=200),
    optimizer=OptimizerConfig(
        learning_rate=1e-3, schedule="constant", warmup_steps=0, beta2=0.98, weight_decay=0.0, clip_norm=0.0
    ),
    training=TrainingConfig(steps=2000),
)

"""What a sentence of financial news says of a company, from 500 labelled ones: negative, neutral or positive.

Whether it is good that something rose depends on what it is; denials turn that round, and what may be is neutral. The
data are synthetic: a grammar makes them (`jaxcost/data/synthetic.py`), so that they need no network, and figures on
them say little of any other data. With a network, `--data.name huggingface:financial_phrasebank/sentences_50agree` is
the Financial PhraseBank, of people (Malo et al. 2014, arXiv:1307.5336); its text is `--data.text-field sentence`, and
its one split has to be cut (`--data.train-split 'train[:500]' --data.validation-split 'train[80%:]'`).
`--data.train-split train` has all labels of the synthetic ones.
"""

from jaxcost.config import (
    CheckpointConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from jaxcost.data.augmentation import HEDGES, NEGATIONS, AugmentConfig
from jaxcost.models.config import HeadConfig

MOVES = "up down rose increased grew climbed went jumped rise increase grow climb go"
MOVES += " fell decreased shrank declined dropped fall decrease shrink decline"
MATTERS = "sales profit revenue order share margin earnings costs debt loss complaints loans backlog"
PROTECTED = (*NEGATIONS, *HEDGES, *MOVES.split(), *MATTERS.split())

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
        head=HeadConfig(outputs=3, pooling="mean", bias=True),
    ),
    data=DataConfig(
        name="synthetic_financial_news",
        train_split="train[:500]",
        objective="labels",
        augment=AugmentConfig(synonyms=0.3, keyboard=0.02, protected=PROTECTED),
        tokenizer="bpe",
        bpe_vocab_size=512,
        sequence_length=48,
        batch_size=32,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    training=TrainingConfig(steps=400, evaluate_every=100),
    checkpoint=CheckpointConfig(every_steps=200),
)

"""Llama-2-7B trained on 4096-token sequences, the shape that the planner's examples use.

Nothing here trains on a laptop: it is there to be planned. `python scripts/plan.py configs/llama2_7b.py --topology
v5e:16x16` compiles its train step for 256 chips in about a minute on two cores.
"""

from jaxcost.config import Experiment
from jaxcost.data.config import DataConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.sharding import MeshConfig
from jaxcost.training.config import TrainingConfig

experiment = Experiment(
    model=ModelConfig(
        vocab_size=32000,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_width=11008,
        max_length=4096,
    ),
    data=DataConfig(batch_size=256, sequence_length=4096),
    mesh=MeshConfig(fsdp=-1),
    execution=ExecutionConfig(compute="bfloat16", gradients="bfloat16", remat="full"),
    training=TrainingConfig(steps=1000),
)

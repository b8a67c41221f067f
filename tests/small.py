"""A small model, what tests of transforms ask of its weights, and chips that are only described."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import sharding, weights
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize
from jaxcost.training.optimizer import OptimizerConfig, make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import chain


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What JAX says of a TPU chip."""

    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def tpus(x, y, z=1, slices=1):
    """The chips of slices as JAX lists them: slice by slice, x fastest."""
    places = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    return [Tpu(place, number) for number in range(slices) for place in places]


CONFIG = ModelConfig(
    vocab_size=32, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=24
)
GPT2 = dataclasses.replace(
    CONFIG,
    num_kv_heads=4,
    norm="layer",
    gated=False,
    activation="gelu",
    position="learned",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
"""The same with all that GPT-2 has and Llama has not."""
MODEL = Transformer(CONFIG)

KERNELS = [f"layers/attention/{name}/kernel" for name in ("key", "output", "query", "value")]
KERNELS += [f"layers/mlp/{name}/kernel" for name in ("down", "gate", "up")]
UP = "layers/mlp/up/kernel"


def assert_close(found, expected):
    """The same but for the rounding of float32, which is that of the largest entries where they are summed up."""
    largest = np.abs(expected).max(initial=5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6 * largest)


@functools.cache
def dense_params():
    return jax.jit(lambda key: initialize(MODEL, key)[0])(jax.random.key(0))


@functools.cache
def forward():
    return jax.jit(lambda params: MODEL.apply({"params": params}, tokens())[0])


def trained(model, params, batches, mesh, *, transform=None, learning_rate=1e-2, **options):
    """The metrics of a step on each batch on a mesh, and the weights after them; they are transformed already."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=learning_rate, warmup_steps=2), 3)
    step = jax.jit(make_train_step(model, optimizer, transform or chain(), **options))
    found = []
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.shardings(params, axes_of(model, params), mesh))
        state = init_state(params, optimizer, seed=0)
        for batch in batches:
            state, metrics = step(state, sharding.place_batch(batch, mesh))
            found.append({name: float(value) for name, value in metrics.items()})
    return found, jax.device_get(state.params)


def tokens():
    return jax.random.randint(jax.random.key(7), (2, 8), 0, CONFIG.vocab_size)


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def flat(params):
    """The weights by path."""
    found = {}
    weights.map_weights(lambda path, w: found.setdefault(path, w), params)
    return found


def pruned_counts(mask):
    """Pruned entries of each matrix of a stack."""
    return np.sum(~np.asarray(mask), axis=(-2, -1)).ravel().tolist()

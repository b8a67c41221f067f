"""Where trees of weights live on a mesh whose axes do not divide them."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import small
from small import QUICK
from sweep import sweep

from jaxcost import sharding
from jaxcost.models.transformer import Transformer, axes_of, initialize


@sweep("tied", [True, False], quick=1)
def test_a_vocabulary_that_the_mesh_does_not_divide_is_whole_on_every_device(tied):
    config = dataclasses.replace(small.CONFIG, vocab_size=33, tie_embeddings=tied)
    model, rng = Transformer(config), np.random.default_rng(0)
    params = jax.jit(lambda key: initialize(model, key)[0], compiler_options=QUICK)(jax.random.key(0))
    batch = {"inputs": rng.integers(0, 33, (8, 6)), "targets": rng.integers(0, 33, (8, 6)), "mask": np.ones((8, 6))}

    def step(sizes):
        mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(dataclasses.astuple(sizes))])
        (metrics,), after = small.trained(model, params, [batch], mesh)
        homes = sharding.shardings(params, axes_of(model, params), mesh)
        return metrics, after, homes["embed"]["table"].spec

    want, trained, _ = step(sharding.MeshConfig())
    got, same, spec = step(sharding.MeshConfig(fsdp=4, tensor=2))
    assert spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert [got[name] for name in want] == pytest.approx([want[name] for name in want], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, trained)

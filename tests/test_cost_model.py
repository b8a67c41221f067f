"""The three ways to count agree on the transformer that the library builds: closed form, trace, compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxcost import weights
from jaxcost.cost import closed_form, hlo, trace
from jaxcost.models import transformer
from jaxcost.models.config import ModelConfig

SMALL = ModelConfig(vocab_size=128, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
CONFIGS = {
    "llama": SMALL,
    "gpt": dataclasses.replace(
        SMALL, num_kv_heads=4, gated=False, norm="layer", position="learned", tie_embeddings=True
    ),
}
BATCH, SEQUENCE = 2, 16


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_flops_agree(name):
    config = CONFIGS[name]
    model = transformer.Transformer(config)
    params, _ = transformer.abstract(model)

    def loss(params, tokens):
        hidden, _ = model.apply({"params": params}, tokens)
        return (weights.contract(hidden, transformer.unembedding(params)) ** 2).sum()

    tokens = jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.int32)
    forward = BATCH * SEQUENCE * closed_form.forward_flops_per_token(config, SEQUENCE, "full")
    step = jax.jit(jax.grad(loss))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == closed_form.parameter_counts(config).total
    assert trace.flops_of(loss, params, tokens).flops == forward
    assert trace.flops_of(step, params, tokens).flops == 3 * forward
    assert hlo.compiled_cost(step.lower(params, tokens).compile()).flops == 3 * forward

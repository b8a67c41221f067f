"""The three ways to count agree on the transformer that the library builds: closed form, trace, compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
from sweep import sweep

from jaxcost import weights
from jaxcost.cost import closed_form, hlo, trace
from jaxcost.models import transformer
from jaxcost.models.config import ModelConfig

SMALL = ModelConfig(vocab_size=128, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
CONFIGS = {
    "llama": SMALL,
    "gpt": dataclasses.replace(
        SMALL,
        num_kv_heads=4,
        gated=False,
        norm="layer",
        position="learned",
        tie_embeddings=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "windows": dataclasses.replace(
        SMALL, pattern=("local", "global"), window=4, norm_placement="both", query_key_norm="head", qkv_bias=True
    ),
    "windows that blocks do not divide": dataclasses.replace(
        SMALL, pattern=("local",), window=3, norm_placement="post", query_key_norm="projection"
    ),
    "stream": dataclasses.replace(SMALL, norm="layer", norm_placement="stream"),
    # A row for every pair of a token and an expert, none of them empty.
    "experts": dataclasses.replace(SMALL, experts=4, experts_per_token=2, capacity_factor=1.0, shared_width=24),
    "plain experts": dataclasses.replace(SMALL, experts=8, experts_per_token=1, capacity_factor=1.0, gated=False),
}
BATCH, SEQUENCE = 2, 16


@sweep("name", CONFIGS, quick=2)
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


def test_dropless_experts_cost_those_that_a_token_meets_and_capacities_the_rows_that_they_hold():
    tokens = jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.int32)

    def forward(config):
        model = transformer.Transformer(config)
        params, _ = transformer.abstract(model)
        return trace.flops_of(lambda params, tokens: model.apply({"params": params}, tokens)[0], params, tokens).flops

    dropless = dataclasses.replace(SMALL, experts=4, experts_per_token=2, vocab_size=128)
    head = 2 * BATCH * SEQUENCE * 128 * 32
    expected = BATCH * SEQUENCE * closed_form.forward_flops_per_token(dropless, SEQUENCE, "full")
    assert forward(dropless) == expected - head
    experts = BATCH * SEQUENCE * 2 * 3 * 2 * 3 * 32 * 48
    wide = dataclasses.replace(dropless, capacity_factor=1.5)
    assert forward(wide) == expected - head + experts // 2

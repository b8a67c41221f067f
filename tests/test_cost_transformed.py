"""The closed form of a training step with weights of any kind is what the compiled step costs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from sweep import sweep

from jaxcost.cost import closed_form
from jaxcost.cost.hlo import compiled_cost
from jaxcost.cost.transformed import Multiplied, multiplied, training_step_flops
from jaxcost.models.config import EncoderConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, abstract
from jaxcost.training.config import OptimizerConfig
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import (
    bottleneck,
    chain,
    factorize,
    freeze,
    ia3,
    lora,
    norm_only,
    prefix_tuning,
    prompt_tuning,
    prune,
    quantize,
    shrink,
)
from jaxcost.weights import Adapters, Frozen

CONFIG = ModelConfig(
    vocab_size=256, width=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=160, max_length=128
)
BATCH, SEQUENCE = 4, 64

TRANSFORMS = {
    "plain": chain(),
    "masked": prune(),
    "shrunk": shrink(heads=2, head_dim=16, mlp=0.6, layers=3),
    "lora": lora(rank=4),
    "dora": lora(rank=4, dora=True),
    "qlora on nf4": chain(quantize(numbers="nf", bits=4, group=16), lora(rank=4)),
    "low rank": factorize(),
    "lora on low rank": chain(factorize(), lora(rank=2)),
    "top layers": freeze(top_layers=1),
    "norms": norm_only(),
    "ia3": ia3(),
    "prompt": prompt_tuning(tokens=8),
    "prefix": prefix_tuning(tokens=8),
    "bottleneck": bottleneck(width=8),
}


ENCODED = dataclasses.replace(
    CONFIG, position="relative", encoder=EncoderConfig(num_layers=3, num_heads=2, num_kv_heads=1, max_length=48)
)
EXPERTS = dataclasses.replace(
    CONFIG, mlp_width=96, experts=4, experts_per_token=2, capacity_factor=1.25, shared_width=32
)


def compiled_and_closed(transform, unroll, config=CONFIG):
    model = Transformer(config, ExecutionConfig(unroll=unroll))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    params = transform.abstract(abstract(model)[0])
    state = jax.eval_shape(lambda params: init_state(params, optimizer, 0), params)
    batch = {name: jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.int32) for name in ("inputs", "targets")}
    if config.encoder.num_layers:
        batch["source"] = jax.ShapeDtypeStruct((BATCH, config.source.max_length), jnp.int32)
    batch["mask"] = jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.float32)
    step = jax.jit(make_train_step(model, optimizer, transform))
    compiled = compiled_cost(step.lower(state, batch).compile()).flops
    return compiled, training_step_flops(config, params, BATCH, SEQUENCE, "full")


@sweep("name", ["plain", "shrunk", "lora", "low rank", "top layers"], quick=1)
def test_experts_cost_the_rows_that_they_have_room_for(name):
    compiled, closed = compiled_and_closed(TRANSFORMS[name], "never", EXPERTS)
    assert closed == pytest.approx(compiled, rel=1e-3)


@sweep("name", ["plain", "masked", "lora", "low rank", "top layers", "norms", "prefix", "bottleneck"], quick=0)
def test_an_encoder_costs_what_its_source_is_long(name):
    compiled, closed = compiled_and_closed(TRANSFORMS[name], "never", ENCODED)
    assert closed == pytest.approx(compiled, rel=1e-3)


def test_experts_without_a_capacity_cost_what_each_token_is_sent_to():
    dropless = dataclasses.replace(EXPERTS, capacity_factor=0.0, shared_width=0)
    params = abstract(Transformer(dropless))[0]
    dense = dataclasses.replace(dropless, experts=0, mlp_width=2 * dropless.mlp_width)
    routers = 3 * 2 * 4 * 64 * 4 * BATCH * SEQUENCE
    found = training_step_flops(dropless, params, BATCH, SEQUENCE)
    assert found - routers == training_step_flops(dense, abstract(Transformer(dense))[0], BATCH, SEQUENCE)


@sweep("name", TRANSFORMS, quick=2)
def test_a_scanned_step_costs_what_the_closed_form_says(name):
    compiled, closed = compiled_and_closed(TRANSFORMS[name], "never")
    assert closed == pytest.approx(compiled, rel=1e-3)


@sweep("name", ["plain", "lora", "dora", "qlora on nf4", "low rank", "lora on low rank"], quick=1)
def test_an_unrolled_step_costs_what_the_closed_form_says_within_a_twentieth(name):
    # The compiler sees that the gradient of the lowest layer's inputs is not needed where nothing below it trains.
    compiled, closed = compiled_and_closed(TRANSFORMS[name], "always")
    assert compiled <= closed <= 1.05 * compiled


def test_both_closed_forms_agree_on_an_encoder():
    params = abstract(Transformer(ENCODED))[0]
    assert closed_form.parameter_counts(ENCODED).total == sum(a.size for a in jax.tree.leaves(params))
    for attention in ("full", "causal"):
        want = BATCH * SEQUENCE * closed_form.training_flops_per_token(ENCODED, SEQUENCE, attention)
        assert training_step_flops(ENCODED, params, BATCH, SEQUENCE, attention) == want


def test_both_closed_forms_agree():
    params = abstract(Transformer(CONFIG))[0]
    for attention in ("full", "causal"):
        tokens = BATCH * SEQUENCE
        want = tokens * closed_form.training_flops_per_token(CONFIG, SEQUENCE, attention)
        assert training_step_flops(CONFIG, params, BATCH, SEQUENCE, attention) == want
        adapted = lora(rank=4).abstract(params)
        count = sum(leaf.size for leaf in jax.tree.leaves(adapted)) - sum(leaf.size for leaf in jax.tree.leaves(params))
        want = tokens * closed_form.adapter_training_flops_per_token(CONFIG, SEQUENCE, count, attention=attention)
        assert training_step_flops(CONFIG, adapted, BATCH, SEQUENCE, attention) == want


def test_each_row_is_multiplied_with_one_adapter_of_many():
    base = jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)
    a, b = (jax.ShapeDtypeStruct((2, 5, *shape), jnp.float32) for shape in ((6, 3), (3, 8)))
    several = Adapters(base, a, b, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert multiplied(several) == Multiplied(2 * 48 + 2 * 3 * 14, 2 * 3 * 14)
    assert multiplied(Frozen(several)) == Multiplied(2 * 48 + 2 * 3 * 14, 0)

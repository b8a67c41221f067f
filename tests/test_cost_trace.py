"""FLOPs of traced functions against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxcost.cost import trace


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def layer(x, w):
    return jnp.tanh(x @ w), None


def scanned_loss(w, x):
    """w (L, D, D), x (B, D)."""
    return jax.lax.scan(layer, x, w)[0].sum()


W, X = spec(6, 64, 64), spec(8, 64)
MATMUL = 2 * 8 * 64 * 64


@pytest.mark.parametrize(
    ("dtype", "output", "name"),
    [(jnp.float32, None, "f32"), (jnp.bfloat16, jnp.float32, "bf16"), (jnp.int8, jnp.int32, "int8")],
)
def test_dot_counts_under_its_operand_type(dtype, output, name):
    cost = trace.flops_of(
        functools.partial(jnp.dot, preferred_element_type=output), spec(4, 5, dtype=dtype), spec(5, 7, dtype=dtype)
    )
    assert cost.flops_by_type == {name: 2 * 4 * 5 * 7}
    assert cost.unestimated == ()


def test_batched_einsum_counts_batch_and_contraction():
    cost = trace.flops_of(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), spec(2, 5, 3, 4), spec(2, 6, 3, 4))
    assert cost.flops == 2 * (2 * 3 * 5 * 6) * 4


def test_scan_counts_its_length():
    assert trace.flops_of(scanned_loss, W, X).flops == 6 * MATMUL


def test_nested_scans_multiply():
    def outer(w, x):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(layer, x, w)[0], None), x, length=5)[0]

    assert trace.flops_of(outer, W, X).flops == 5 * 6 * MATMUL


def test_gradient_of_both_operands_is_three_forward_passes():
    grad = jax.grad(scanned_loss, argnums=(0, 1))
    assert trace.flops_of(grad, W, X).flops == 3 * 6 * MATMUL


def test_unused_weight_gradient_costs_nothing():
    """The backward function makes both gradients; only the activation's is returned."""

    def activation_gradient(w, x):
        _, pullback = jax.vjp(lambda w, x: jnp.tanh(x @ w), w, x)
        return pullback(jnp.ones(x.shape))[1]

    def both(w, x):
        return jax.vjp(lambda w, x: jnp.tanh(x @ w), w, x)[1](jnp.ones(x.shape))

    assert trace.flops_of(activation_gradient, spec(64, 64), X).flops == 2 * MATMUL
    assert trace.flops_of(both, spec(64, 64), X).flops == 3 * MATMUL


def test_frozen_weights_cost_four_instead_of_six():
    grad = jax.grad(lambda x, w: scanned_loss(w, x))
    assert trace.flops_of(grad, X, W).flops == 2 * 6 * MATMUL


def test_remat_recomputes_and_plain_does_not():
    def two_matmuls(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    def loss(w, x, body):
        return jax.lax.scan(body, x, w)[0].sum()

    plain = trace.flops_of(jax.grad(functools.partial(loss, body=two_matmuls)), W, X).flops
    remat = trace.flops_of(jax.grad(functools.partial(loss, body=jax.checkpoint(two_matmuls))), W, X).flops
    assert plain == 6 * 6 * MATMUL
    assert remat == 8 * 6 * MATMUL


def test_custom_rules_and_jit_are_entered():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (product(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    @jax.custom_jvp
    def square(x):
        return x @ x

    square.defjvp(lambda primals, tangents: (square(*primals), tangents[0] @ primals[0]))
    w = spec(64, 64)
    assert trace.flops_of(jax.jit(product), X, w).flops == MATMUL
    assert trace.flops_of(jax.grad(lambda w, x: (product(x, w) ** 2).sum(), argnums=(0, 1)), w, X).flops == 3 * MATMUL
    assert trace.flops_of(square, w).flops == 2 * 64**3


def test_cond_counts_its_most_expensive_branch():
    def choose(p, w, x):
        return jax.lax.cond(p, lambda: x @ w @ w, lambda: x @ w)

    assert trace.flops_of(choose, spec(dtype=jnp.bool_), spec(64, 64), X).flops == 2 * MATMUL


def test_fori_loop_with_static_bounds_counts_its_trips():
    cost = trace.flops_of(lambda w, x: jax.lax.fori_loop(2, 9, lambda i, x: x @ w, x), spec(64, 64), X)
    assert cost.flops == 7 * MATMUL
    assert cost.unestimated == ()


def test_while_of_unknown_length_is_listed_and_not_counted():
    def loop(w, x):
        return jax.lax.while_loop(lambda x: x.sum() < 7, lambda x: x @ w, x) @ w

    cost = trace.flops_of(loop, spec(64, 64), X)
    assert cost.flops == MATMUL
    assert cost.unestimated == (f"while: unknown trip count, {MATMUL} FLOPs a trip",)


def test_decompositions_and_callbacks_are_listed():
    def solve(a):
        return jnp.linalg.cholesky(a), jax.pure_callback(np.sin, spec(8, 8), a)

    assert trace.flops_of(solve, spec(8, 8)).unestimated == ("cholesky", "pure_callback")


def test_shard_map_counts_every_device():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    P = PartitionSpec
    product = jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "tensor"),
        mesh=mesh,
        in_specs=(P("data", "tensor"), P("tensor", None)),
        out_specs=P("data", None),
    )
    assert trace.flops_of(product, X, spec(64, 64)).flops == MATMUL


def test_convolution_counts_taps_inside_the_image():
    """3 x 3 over 16 x 16 with SAME padding meets 46 x 46 taps."""
    cost = trace.flops_of(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        spec(2, 16, 16, 8),
        spec(3, 3, 8, 32),
    )
    assert cost.flops == 2 * 2 * 32 * 8 * 46 * 46


def test_grouped_strided_convolution():
    cost = trace.flops_of(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4
        ),
        spec(2, 9, 8),
        spec(3, 2, 12),
    )
    assert cost.flops == 2 * 2 * 12 * 2 * (4 * 3)


def test_ragged_dot_counts_each_row_once():
    cost = trace.flops_of(jax.lax.ragged_dot, spec(12, 5), spec(3, 5, 7), spec(3, dtype=jnp.int32))
    assert cost.flops == 2 * 12 * 5 * 7

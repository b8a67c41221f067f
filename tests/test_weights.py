"""The law of weights: `contract(x, w) == x @ materialize(w)`, for every kind and every kind inside every other."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from sweep import sweep

from jaxcost import weights
from jaxcost.weights import (
    Adapters,
    Dora,
    Frozen,
    Lora,
    LowRank,
    Masked,
    Observed,
    QuantAware,
    Quantized,
    QuantSpec,
    Scaled,
    Scored,
    Weight,
    blank_inputs,
    contract,
    fake_quantize,
    materialize,
    quantized,
)

AQT = QuantSpec(backend="aqt")
REFERENCE = QuantSpec(backend="reference")
SCALE = 0.75


def dense(key, stack, inward, outward, rank):
    return jax.random.normal(key, (*stack, inward, outward)) / inward**0.5


def mask_for(key, stack, inward, outward):
    return jax.random.bernoulli(key, 0.6, (*stack, inward, outward))


def low_rank(key, stack, inward, outward, rank, left=dense, right=dense):
    key_u, key_v = jax.random.split(key)
    return LowRank(left(key_u, stack, inward, rank, rank), right(key_v, stack, rank, outward, rank))


def adapted(key, stack, inward, outward, rank, base=dense, left=dense, right=dense):
    key_base, key_update = jax.random.split(key)
    update = low_rank(key_update, stack, inward, outward, rank, left, right)
    return Lora(base(key_base, stack, inward, outward, rank), update.u, update.v, SCALE)


def adapters(key, stack, inward, outward, rank, base=dense):
    """Three adapters, of which every layer takes another one and the last none."""
    key_base, key_update = jax.random.split(key)
    update = low_rank(key_update, (*stack, 3), inward, outward, rank)
    choice = 1 - jnp.arange(np.prod(stack, dtype=int)).reshape(stack) % 3
    return Adapters(base(key_base, stack, inward, outward, rank), update.u, update.v, choice.astype(jnp.int32))


def dora(key, stack, inward, outward, rank, inner=adapted):
    magnitude = jax.random.uniform(jax.random.fold_in(key, 1), (*stack, outward), minval=0.5, maxval=2.0)
    return Dora(inner(key, stack, inward, outward, rank), magnitude)


def masked(key, stack, inward, outward, rank, inner=dense):
    return Masked(inner(key, stack, inward, outward, rank), mask_for(key, stack, inward, outward))


def observed(key, stack, inward, outward, rank, inner=dense):
    return Observed(inner(key, stack, inward, outward, rank), blank_inputs((*stack, inward, outward), gram=True))


def calibrated(key, stack, inward, outward, rank):
    w = quantized(dense(key, stack, inward, outward, rank), activation_bits=8)
    return w.replace(activation_scale=jnp.full(stack, 0.05))


def scaled(key, stack, inward, outward, rank, side="in", trains=False, inner=dense):
    channels = {"in": inward, "out": outward}[side]
    scale = jax.random.uniform(jax.random.fold_in(key, 1), (*stack, channels), minval=0.5, maxval=2.0)
    return Scaled(inner(key, stack, inward, outward, rank), scale, side, trains)


def growing(key, stack, inward, outward, rank, inner=dense):
    return masked(key, stack, inward, outward, rank, inner).replace(dense_gradient=True)


def scored(key, stack, inward, outward, rank, inner=dense):
    kept = masked(key, stack, inward, outward, rank, inner)
    return Scored(kept.weight, kept.mask, scores=dense(key, stack, inward, outward, rank))


KINDS = {
    "dense": dense,
    "masked": masked,
    "scored": scored,
    "low_rank": low_rank,
    "lora": adapted,
    "dora": dora,
    "adapters": adapters,
    "quantized": lambda *args: quantized(dense(*args)),
    "groups": lambda *args: quantized(dense(*args), "nf4", group=1),
    "integers": lambda *args: quantized(dense(*args), "int4", activation_bits=8),
    "calibrated": lambda *args: calibrated(*args),
    "aqt": lambda *args: QuantAware(dense(*args), AQT),
    "reference": lambda *args: QuantAware(dense(*args), REFERENCE),
    "frozen": lambda *args: Frozen(dense(*args)),
    "observed": lambda *args: observed(*args),
    "scaled": lambda *args: scaled(*args),
    "scaled, trained": lambda *args: scaled(*args, side="out", trains=True),
}
"""name → a builder (key, stack, inward, outward, rank) of each kind around dense arrays."""

SLOTS = {
    "masked.weight": lambda inner: lambda *args: masked(*args, inner=inner),
    "growing.weight": lambda inner: lambda *args: growing(*args, inner=inner),
    "scored.weight": lambda inner: lambda *args: scored(*args, inner=inner),
    "low_rank.u": lambda inner: lambda *args: low_rank(*args, left=inner),
    "low_rank.v": lambda inner: lambda *args: low_rank(*args, right=inner),
    "lora.base": lambda inner: lambda *args: adapted(*args, base=inner),
    "lora.a": lambda inner: lambda *args: adapted(*args, left=inner),
    "lora.b": lambda inner: lambda *args: adapted(*args, right=inner),
    "dora.weight": lambda inner: lambda *args: dora(*args, inner=inner),
    "adapters.base": lambda inner: lambda *args: adapters(*args, base=inner),
    "aqt.weight": lambda inner: lambda *args: QuantAware(inner(*args), AQT),
    "reference.weight": lambda inner: lambda *args: QuantAware(inner(*args), REFERENCE),
    "frozen.weight": lambda inner: lambda *args: Frozen(inner(*args)),
    "observed.weight": lambda inner: lambda *args: observed(*args, inner=inner),
    "scaled.weight": lambda inner: lambda *args: scaled(*args, inner=inner),
}
"""Every place inside a kind that holds a weight → the builder of that kind with another kind in that place."""

BUILDERS = KINDS | {f"{slot}={kind}": hold(build) for slot, hold in SLOTS.items() for kind, build in KINDS.items()}
ROUNDING = {"aqt", "reference", "integers", "calibrated"}
DIAGONAL = list(BUILDERS)[: len(KINDS)] + list(BUILDERS)[len(KINDS) :: len(KINDS) + 1]
"""Every kind by itself, and every place with one kind in it."""
FLOAT_BUILDERS = [name for name in BUILDERS if not ROUNDING & set(re.split("[.=]", name))]
SHAPES = [((), 1, 1, 1), ((3,), 1, 5, 1), ((2, 3), 13, 11, 3), ((1,), 31, 1, 2)]
"""(batch, inward, outward, rank)."""


def build(name, stack=(), inward=7, outward=5, rank=2, seed=0):
    return BUILDERS[name](jax.random.key(seed), stack, inward, outward, rank)


def descendants(kind):
    return {found for child in kind.__subclasses__() for found in (child, *descendants(child))}


def test_every_kind_and_every_place_that_holds_a_weight_is_in_the_lists():
    kinds = {type(build(name)) for name in KINDS} - {type(jnp.zeros(()))}
    assert kinds == descendants(Weight)
    holding = {
        (kind.__name__, field.name) for kind in kinds for field in dataclasses.fields(kind) if field.type == "Any"
    }
    listed = {"masked": "Masked", "growing": "Masked", "scored": "Scored", "low_rank": "LowRank", "lora": "Lora"}
    listed |= {"aqt": "QuantAware", "reference": "QuantAware", "observed": "Observed", "scaled": "Scaled"}
    listed |= {"dora": "Dora", "adapters": "Adapters", "frozen": "Frozen"}
    assert holding == {(listed[kind], field) for kind, field in (slot.split(".") for slot in SLOTS)}
    assert len(BUILDERS) == len(KINDS) * (1 + len(SLOTS))


# ---- The law ----


def error_bound(size_x, error_x, w, dtype):
    """How far contract may be from x @ materialize(w), for every entry of the result.

    With |x| ≤ size_x, known to within error_x, and u the unit roundoff of the activation's dtype:
    * a float product rounds its weight, its result and (Quantized) its scaling, so 8·u of |x|·|w|, and accumulates
      in float32, so n·2^-24 of it;
    * products in a row hand the error of the first on to the second;
    * QuantAware, and Quantized with integer activations, move each activation to the nearest point of a grid of step
      s = max|x| / 127, or of a calibrated one, so by s / 2, and by what lies beyond the largest point.
    """
    unit = float(jnp.finfo(dtype).eps) / 2
    size_w = np.abs(np.asarray(materialize(w), np.float64))
    rounding = 8 * unit + sum(size_w.shape) * 2.0**-24

    def through(size_x, error_x, w):
        size_w = np.abs(np.asarray(materialize(w), np.float64))
        if isinstance(w, Frozen | Observed):
            return through(size_x, error_x, w.weight)
        if isinstance(w, Scaled):
            return scaled_error(size_x, error_x, w)
        if isinstance(w, Dora):
            norm = np.linalg.norm(materialize(w.weight), axis=-2)
            factor = np.asarray(w.magnitude) / np.where(norm > 0, norm, 1.0)
            return scaled_error(size_x, error_x, Scaled(w.weight, factor, "out"))
        if isinstance(w, Adapters):
            return through(size_x, error_x, Lora(w.base, w.a[w.choice], w.b[w.choice] * (w.choice >= 0), 1.0))
        if isinstance(w, LowRank):
            return in_a_row(size_x, error_x, w.u, w.v)
        if isinstance(w, Lora):
            update = in_a_row(size_x, error_x, w.a, w.b)
            sizes = size_x @ np.abs(np.asarray(materialize(w.base), np.float64)) + w.scale * product(size_x, w.a, w.b)
            return through(size_x, error_x, w.base) + w.scale * update + rounding * sizes
        if isinstance(w, Masked) and isinstance(w.weight, Quantized):
            return through(size_x, error_x, w.weight.masked(w.mask))
        bits = w.spec.bits if isinstance(w, QuantAware) else getattr(w, "activation_bits", None)
        if bits is not None:
            limit = weights.integer_limit(bits)
            step = getattr(w, "activation_scale", None)
            step = np.max(size_x + error_x, axis=-1, keepdims=True) / limit if step is None else float(step)
            error_x = error_x + step * (0.5 + limit * 2.0**-22) + np.maximum(size_x + error_x - limit * step, 0)
        return error_x @ size_w + rounding * (size_x + error_x) @ size_w

    def scaled_error(size_x, error_x, w):
        scale = np.abs(np.asarray(w.scale, np.float64))
        if w.side == "out":
            size_y = size_x @ np.abs(np.asarray(materialize(w.weight), np.float64))
            return scale * (through(size_x, error_x, w.weight) + rounding * size_y)
        return through(size_x * scale, error_x * scale + rounding * size_x * scale, w.weight)

    def in_a_row(size_x, error_x, first, second):
        size_first = np.abs(np.asarray(materialize(first), np.float64))
        result = through(size_x @ size_first, through(size_x, error_x, first), second)
        return result + rounding * product(size_x, first, second)

    def product(size_x, first, second):
        for w in (first, second):
            size_x = size_x @ np.abs(np.asarray(materialize(w), np.float64))
        return size_x

    return through(size_x, error_x, w) + 1e-30


@sweep("name", sorted(BUILDERS, key=DIAGONAL.__contains__, reverse=True), quick=len(DIAGONAL), slow=len(BUILDERS))
@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), st.sampled_from([jnp.float32, jnp.bfloat16]), st.integers(0, 2**16))
def test_contracting_is_multiplying_with_what_the_weight_means(name, shape, dtype, seed):
    batch, inward, outward, rank = shape
    w = build(name, (), inward, outward, rank, seed)
    x = jax.random.normal(jax.random.key(seed + 1), (*batch, inward)).astype(dtype)
    y = contract(x, w)
    assert (y.shape, y.dtype) == ((*batch, outward), dtype)
    assert materialize(w).shape == (inward, outward)
    exact_x = np.asarray(x, np.float64)
    expected = exact_x @ np.asarray(materialize(w), np.float64)
    excess = np.abs(np.asarray(y, np.float64) - expected) - error_bound(np.abs(exact_x), 0 * exact_x, w, dtype)
    assert np.max(excess) <= 0


@sweep("outer", ["", *SLOTS], quick=0)
def test_law_holds_under_jit_vmap_scan_checkpoint_and_grad(outer):
    stacked = {name: build(name, (2,)) for name in BUILDERS if name.rpartition("=")[0] == outer}
    assert len(stacked) == len(KINDS)
    x = jax.random.normal(jax.random.key(1), (4, 7))
    cotangent = jax.random.normal(jax.random.key(2), (4, 5))
    trainable, frozen = weights.partition(stacked)

    def scanned(trainable, x):
        def step(total, layer):
            y = {name: jax.checkpoint(contract)(x, w) for name, w in layer.items()}
            return total + sum(jnp.sum(one * cotangent) for one in y.values()), y

        return jax.lax.scan(step, 0.0, weights.combine(stacked, trainable, frozen))

    # What is compared here is JAX's tracing, so the compiler is told not to optimise, which takes it most of its time.
    @jax.jit
    def all_at_once(trainable, x):
        (_, y), gradients = jax.value_and_grad(scanned, argnums=(0, 1), has_aux=True)(trainable, x)
        return y, {name: jax.vmap(contract, (None, 0))(x, w) for name, w in stacked.items()}, gradients

    def layer(w, i):
        return jax.tree.map(lambda a: a[i], w)

    def one_by_one(trainable, x):
        stacked_w = weights.combine(stacked, trainable, frozen)
        return sum(jnp.sum(contract(x, layer(w, i)) * cotangent) for w in stacked_w.values() for i in range(2))

    y, mapped, gradients = all_at_once(trainable, x)
    for name, w in stacked.items():
        expected = np.stack([contract(x, layer(w, i)) for i in range(2)])
        np.testing.assert_allclose(y[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(mapped[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
        meant = np.stack([materialize(layer(w, i)) for i in range(2)])
        np.testing.assert_allclose(materialize(w), meant, rtol=1e-6, atol=1e-6, err_msg=name)
    to_trainable, to_x = jax.grad(one_by_one, (0, 1))(trainable, x)
    np.testing.assert_allclose(gradients[1], to_x, rtol=1e-4, atol=1e-4)
    for path, want in to_trainable.items():
        np.testing.assert_allclose(gradients[0][path], want, rtol=1e-4, atol=1e-4, err_msg=path)


# ---- Gradients ----


@sweep("name", sorted(FLOAT_BUILDERS, key=DIAGONAL.__contains__, reverse=True), quick=25, slow=len(BUILDERS))
def test_gradients_are_those_of_multiplying_with_what_the_weight_means(name):
    w = build(name)
    x = jax.random.normal(jax.random.key(1), (3, 2, 7))
    cotangent = jax.random.normal(jax.random.key(2), (3, 2, 5))
    trainable, frozen = weights.partition(w)

    def through(multiply):
        def f(trainable, x):
            return jnp.sum(multiply(x, weights.combine(w, trainable, frozen)) * cotangent)

        return jax.grad(f, argnums=(0, 1))(trainable, x)

    got, want = through(contract), through(lambda x, w: x @ materialize(w))
    assert got[0].keys() == want[0].keys() == trainable.keys()
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)
        assert np.any(leaf != 0)


@pytest.mark.parametrize("slot", ["frozen.weight", "lora.base", "adapters.base"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_flows_to_what_is_frozen_even_when_asked(slot, kind):
    w = build(f"{slot}={kind}")
    x = jnp.ones((3, 7))

    def flows(f):
        return jax.grad(lambda w: jnp.sum(f(w) ** 2), allow_int=True)(w)

    for gradient in (flows(lambda w: contract(x, w)), flows(materialize)):
        inner = gradient.weight if slot == "frozen.weight" else gradient.base
        for leaf in jax.tree.leaves(inner):
            assert leaf.dtype == jax.dtypes.float0 or not np.any(leaf)
        if slot != "frozen.weight":
            assert np.any(gradient.a) and np.any(gradient.b)


def test_masked_entries_get_no_gradient_and_kept_ones_do():
    w = build("masked")
    gradient = jax.grad(lambda dense: jnp.sum(contract(jnp.ones((3, 7)), w.replace(weight=dense))))(w.weight)
    np.testing.assert_array_equal(gradient, 3.0 * w.mask)


def test_reference_gradients_pass_straight_through():
    w, x = build("dense"), jax.random.normal(jax.random.key(1), (4, 7))
    cotangent = jax.random.normal(jax.random.key(2), (4, 5))
    _, back = jax.vjp(lambda x, w: contract(x, QuantAware(w, REFERENCE)), x, w)
    to_x, to_w = back(cotangent)
    np.testing.assert_allclose(to_x, cotangent @ fake_quantize(w, 8, axis=-2).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_w, fake_quantize(x, 8, axis=-1).T @ cotangent, rtol=1e-5, atol=1e-6)


def test_bfloat16_gradients_are_close_to_float32_ones_and_have_each_arrays_dtype():
    w, x = build("dense"), jax.random.normal(jax.random.key(1), (6, 7))
    f = lambda x, w: jnp.sum(contract(x, w).astype(jnp.float32) ** 2)  # noqa: E731
    to_x, to_w = jax.grad(f, (0, 1))(x.astype(jnp.bfloat16), w)
    assert (to_x.dtype, to_w.dtype) == (jnp.bfloat16, jnp.float32)
    for got, want in zip((to_x, to_w), jax.grad(f, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0.05, atol=0.05 * np.max(np.abs(want)))


# ---- What trains ----

TRAINS = {
    "dense": {""},
    "masked": {"weight"},
    "scored": {"weight", "scores"},
    "scored.weight=frozen": {"scores"},
    "low_rank": {"u", "v"},
    "lora": {"a", "b"},
    "quantized": set(),
    "groups": set(),
    "calibrated": set(),
    "lora.base=integers": {"a", "b"},
    "aqt": {"weight"},
    "reference": {"weight"},
    "frozen": set(),
    "scaled": {"weight"},
    "scaled, trained": {"weight", "scale"},
    "scaled.weight=frozen": set(),
    "frozen.weight=lora": set(),
    "dora": {"weight/a", "weight/b", "magnitude"},
    "dora.weight=quantized": {"magnitude"},
    "adapters": {"a", "b"},
    "lora.base=quantized": {"a", "b"},
    "lora.base=low_rank": {"a", "b"},
    "lora.a=masked": {"a/weight", "b"},
    "masked.weight=lora": {"weight/a", "weight/b"},
    "masked.weight=quantized": set(),
    "low_rank.u=frozen": {"v"},
    "aqt.weight=masked": {"weight/weight"},
}


@pytest.mark.parametrize("name", TRAINS)
def test_what_trains(name):
    assert set(weights.partition(build(name))[0]) == TRAINS[name]


@pytest.mark.parametrize("name", BUILDERS)
def test_partition_and_combine_are_inverse(name):
    params = {"layers": {"kernel": build(name, (2,)), "steps": jnp.arange(3)}, "scale": jnp.ones(4)}
    trainable, frozen = weights.partition(params)
    assert not trainable.keys() & frozen.keys()
    assert "scale" in trainable and "layers/steps" in frozen
    assert all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in trainable.values())
    back = weights.combine(params, frozen, trainable)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))
    assert jax.tree.structure(weights.trainable_tree(params)) == jax.tree.structure(params)


# ---- Where it lives, and what it is called ----


@pytest.mark.parametrize("stack", [(), (2,), (3, 2)])
@pytest.mark.parametrize("name", BUILDERS)
def test_logical_axes_name_every_axis_of_every_array(name, stack):
    w = jax.eval_shape(lambda: build(name, stack))
    names = ("expert", "layers")[: len(stack)]
    axes = weights.logical_axes(w, PartitionSpec(*names, "embed", "mlp"))
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    assert jax.tree.structure(axes, is_leaf=is_spec) == jax.tree.structure(w)
    sizes = {"expert": 3, "layers": stack[-1] if stack else 0, "embed": 7, "mlp": 5, "rank": 2, None: 1}
    sizes["adapters"] = 3
    sizes |= dict(zip(names, stack, strict=True))
    for spec, array in zip(jax.tree.leaves(axes, is_leaf=is_spec), jax.tree.leaves(w), strict=True):
        # The groups of the kinds above are of one input each.
        assert tuple(sizes[axis and axis.removesuffix("/groups")] for axis in spec) == array.shape


def test_walks_see_paths_and_merge_gives_what_each_weight_means():
    params = {"layers": {"up": {"kernel": build("lora.base=quantized", (2,))}}, "norm": jnp.ones(3)}
    seen = []
    weights.map_weights(lambda path, w: seen.append((path, type(w))), params)
    assert [path for path, _ in seen] == ["layers/up/kernel", "norm"]
    assert seen[0][1] is Lora
    merged = weights.merge(params)
    np.testing.assert_array_equal(merged["layers"]["up"]["kernel"], materialize(params["layers"]["up"]["kernel"]))
    assert merged["norm"] is params["norm"]


# ---- Quantised training ----


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 31, 13)])
def test_aqt_computes_what_the_reference_does(bits, shape):
    batch, inward, outward = shape
    x = jax.random.normal(jax.random.key(3), (batch, inward))
    w = jax.random.normal(jax.random.key(4), (inward, outward))
    aqt, reference = (contract(x, QuantAware(w, QuantSpec(bits, backend=name))) for name in ("aqt", "reference"))
    np.testing.assert_allclose(aqt, reference, rtol=1e-5, atol=1e-5)
    assert inward == 1 or np.max(np.abs(aqt - x @ w)) > 1e-4


@pytest.mark.parametrize("spec", [AQT, REFERENCE])
def test_zeros_quantise_to_zeros(spec):
    w = jnp.zeros((3, 2)).at[0, 0].set(2.0)
    np.testing.assert_array_equal(materialize(QuantAware(w, spec)), w)
    assert not np.any(contract(jnp.zeros((4, 3)), QuantAware(w, spec)))
    assert not np.any(contract(jnp.ones((4, 3)), QuantAware(w, spec))[:, 1])


def test_the_gradient_of_stochastic_rounding_asks_for_a_key_and_the_value_does_not():
    w = QuantAware(build("dense"), QuantSpec(stochastic_rounding=True))
    x = jnp.ones((2, 7))
    np.testing.assert_array_equal(contract(x, w), contract(x, QuantAware(w.weight, AQT)))
    np.testing.assert_array_equal(contract(x, w), contract(x, w, jax.random.key(0)))
    with pytest.raises(ValueError, match="^The gradient of stochastic rounding needs a random key: pass key= to"):
        jax.jit(jax.grad(lambda x: jnp.sum(contract(x, w))))(x)


def test_stochastic_rounding_is_unbiased():
    x, w = jax.random.normal(jax.random.key(1), (4, 7)), build("dense")
    # Gradients whose largest entry is far from the rest, where clipping would show.
    cotangent = jax.random.normal(jax.random.key(2), (4, 5)).at[:, 0].mul(20)

    @jax.jit
    def gradients(keys):
        def one(key):
            f = lambda x: contract(x, QuantAware(w, QuantSpec(stochastic_rounding=True)), key)  # noqa: E731
            return jax.vjp(f, x)[1](cotangent)[0]

        return jax.vmap(one)(keys)

    drawn = np.asarray(gradients(jax.random.split(jax.random.key(5), 4000)), np.float64)
    # The weight is rounded to nearest along the axis that the gradient contracts; only the gradient is random.
    unrounded = np.asarray(cotangent @ fake_quantize(w, 8, axis=-1).T, np.float64)
    standard_error = drawn.std(axis=0) / len(drawn) ** 0.5
    assert np.all(drawn.std(axis=0) > 0)
    assert np.max(np.abs(drawn.mean(axis=0) - unrounded) / standard_error) < 5
    step = np.max(np.abs(cotangent)) / 127
    assert np.max(standard_error) < 0.05 * step


def test_quantized_keeps_the_scale_of_every_output_channel_apart():
    w = jnp.asarray([[1.0, 1000.0], [0.5, -20.0]])
    q = quantized(w)
    assert isinstance(q, Quantized) and q.codes.dtype == jnp.int8 and q.scale.shape == (1, 2)
    np.testing.assert_allclose(q.scale, [[1 / 127, 1000 / 127]], rtol=1e-6)
    np.testing.assert_array_equal(q.codes, [[127, 127], [64, -3]])  # 63.5 and -2.54, to nearest, ties to even


def test_weights_of_one_input_share_the_product_of_its_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8), jnp.bfloat16)
    ws = [jax.random.normal(jax.random.key(i), (8, size)) for i, size in enumerate((6, 2, 4))]

    def loss(x, ws, ways):
        made = weights.contract_all(x, ws, (None,) * len(ws), ways)
        return sum(jnp.sum(jnp.sin(i * y.astype(jnp.float32))) for i, y in enumerate(made, 1))

    def found(ways):
        gradient = jax.value_and_grad(loss, (0, 1))
        return gradient(x, ws, ways), str(jax.make_jaxpr(gradient, static_argnums=2)(x, ws, ways)).count("dot_general")

    ((value, (dx, dws)), products), ((want, (want_dx, want_dws)), apart) = found(2), found(1)
    assert value == want and (products, apart) == (3 + 3 + 1, 3 + 3 + 3)
    jax.tree.map(np.testing.assert_array_equal, dws, want_dws)
    # Rounded to bfloat16 once, not once for every weight.
    scale = np.abs(want_dx.astype(np.float32)).max()
    np.testing.assert_allclose(dx.astype(np.float32), want_dx.astype(np.float32), rtol=0, atol=0.01 * scale)


def test_only_dense_weights_that_devices_split_evenly_share_it():
    x, dense = jnp.ones((3, 8)), jnp.ones((8, 4))
    for ws, ways in (([dense, weights.Frozen(dense)], 2), ([dense, jnp.ones((8, 3))], 2), ([dense], 2)):
        made = weights.contract_all(x, ws, (None,) * len(ws), ways)
        jax.tree.map(np.testing.assert_array_equal, made, [weights.contract(x, w) for w in ws])

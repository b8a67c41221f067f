"""Quantisation: what each grid, rounding and scaling does to a weight and its outputs, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import normal
from sweep import sweep

from jaxcost import weights
from jaxcost.transforms import (
    CalibrationError,
    RuleError,
    calibrated,
    chain,
    factorize,
    lora,
    prune,
    quantize,
    smooth,
)
from jaxcost.transforms import rule as path_rule
from jaxcost.transforms.rounding import gptq
from jaxcost.weights import (
    GRIDS,
    Frozen,
    Inputs,
    Lora,
    LowRank,
    Masked,
    QuantAware,
    Quantized,
    QuantSpec,
    Scaled,
    contract,
    encode,
    materialize,
    quantized,
)
from jaxcost.weights.quantized import NF4_LEVELS, decode, spread

KERNEL = (path_rule("kernel"),)


def store(**options):
    return quantize(rules=KERNEL, **options)


def forward(params, x):
    """x (rows, in) through every layer's kernel, side by side."""
    return jax.vmap(contract, (None, 0))(x, params["layers"]["kernel"])


def apply_to(transform, w, x=None):
    """The transform of a kernel with a layer axis, calibrated on the rows of x if there are any."""
    params = {"layers": {"kernel": w}}
    if x is None:
        return transform(params)["layers"]["kernel"]
    place = lambda make, *arguments: jax.jit(make)(*arguments)  # noqa: E731
    return calibrated(transform, params, None, forward, lambda: [x], place)["layers"]["kernel"]


def output_error(w, found, x):
    """Relative error of the outputs in the Frobenius norm, in float64, the inputs left as they are."""
    x, w, found = (np.asarray(a, np.float64) for a in (x, w, materialize(found)))
    return np.linalg.norm(x @ found - x @ w) / np.linalg.norm(x @ w)


def correlated(rows, features, share, seed=0):
    """Rows of which `share` of the variance is common to groups of features, the rest their own."""
    key_own, key_common, key_mix = jax.random.split(jax.random.key(seed), 3)
    common = jax.random.normal(key_common, (rows, features // 8)) @ jax.random.normal(
        key_mix, (features // 8, features)
    )
    own = jax.random.normal(key_own, (rows, features))
    return np.sqrt(1 - share) * own + np.sqrt(share) * common / (features // 8) ** 0.5


# ---- Grids ----


@pytest.mark.parametrize("group", [None, 4, 8])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_value_goes_to_the_nearest_of_its_grid_and_zeros_stay(grid, group):
    w = normal((2, 24, 9)).at[:, ::3].set(0.0).at[:, :, 4].set(0.0)
    found = quantized(w, grid, group)
    assert found.codes.dtype == GRIDS[grid].dtype and found.codes.shape == w.shape
    assert found.scale.shape == (2, 1 if group is None else 24 // group, 9) and found.scale.dtype == jnp.float32
    everything = np.arange(256).astype(np.uint8)
    codes = {
        "int8": np.arange(-127, 128),
        "int4": np.arange(-7, 8),
        "nf4": np.arange(-8, 8),
        "fp8": everything.view(jnp.float8_e4m3fn),
    }[grid]
    levels = np.asarray(decode(jnp.asarray(codes, GRIDS[grid].dtype), grid, jnp.float32), np.float64)
    levels = levels[np.isfinite(levels)]
    scale = np.asarray(jnp.broadcast_to(spread(found.scale, 24), w.shape), np.float64)
    nearest = np.min(np.abs(np.asarray(w, np.float64)[..., None] / scale[..., None] - levels), axis=-1)
    error = np.abs(np.asarray(materialize(found), np.float64) - np.asarray(w, np.float64)) / scale
    assert np.all(error <= nearest + 1e-5 * GRIDS[grid].largest)
    assert not np.any(materialize(found)[w == 0])
    largest = np.max(np.abs(np.asarray(materialize(found) / scale)).reshape(2, -1, group or 24, 9), axis=2)
    np.testing.assert_allclose(largest[..., [0, 1, 2, 3, 5, 6, 7, 8]], GRIDS[grid].largest, rtol=1e-6)


def test_nf4_is_the_table_that_was_published():
    # Dettmers et al. 2023, appendix E.
    published = """-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0"""
    assert [float(number) for number in published.split(",")] == list(NF4_LEVELS)
    codes = jnp.arange(-8, 8, dtype=jnp.int4)
    np.testing.assert_array_equal(decode(codes, "nf4", jnp.float32), np.float32(NF4_LEVELS))
    np.testing.assert_array_equal(encode(jnp.asarray(NF4_LEVELS), "nf4").astype(jnp.int32), np.arange(-8, 8))
    # And the rule behind it: quantiles of a normal, eight up from zero and seven down, scaled to end at one.
    from scipy.stats import norm

    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    rule = np.sort(np.concatenate([positive, negative, [0.0]]))
    np.testing.assert_allclose(NF4_LEVELS, rule / rule.max(), atol=1e-6)


@pytest.mark.parametrize("grid", ["int8", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_groups_contract_to_what_they_mean(grid, dtype):
    w = quantized(normal((24, 9)), grid, group=4)
    x = normal((5, 24), 1).astype(dtype)
    want = np.asarray(x, np.float64) @ np.asarray(materialize(w), np.float64)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(materialize(w), np.float64))
    assert np.all(np.abs(np.asarray(contract(x, w), np.float64) - want) <= 4 * float(jnp.finfo(dtype).eps) * size)


def test_nf4_errs_less_than_int4_on_normal_weights_and_smaller_groups_err_less():
    w, x = normal((1, 512, 64)), normal((256, 512), 1)
    error = {
        (numbers, group): output_error(w[0], quantized(w, f"{numbers}4", group).masked(jnp.ones(w.shape, bool)), x)
        for numbers in ("int", "nf")
        for group in (None, 64)
    }
    assert error["nf", 64] < 0.9 * error["int", 64] and error["nf", None] < 0.9 * error["int", None]
    assert error["int", 64] < error["int", None] and error["nf", 64] < error["nf", None]
    # The null result: on evenly spread weights the even grid is the better one.
    even = jax.random.uniform(jax.random.key(2), w.shape, minval=-1)
    assert output_error(even[0], quantized(even, "int4", 64), x) < output_error(even[0], quantized(even, "nf4", 64), x)


# ---- Integer products ----


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("grid", ["int4", "int8"])
def test_integer_products_are_sums_of_integers(grid, bits):
    w = quantized(normal((40, 9)), grid, activation_bits=bits)
    x = normal((5, 40), 1).at[2].set(0.0)
    jaxpr = str(jax.make_jaxpr(contract)(x, w))
    assert "preferred_element_type=int32" in jaxpr
    limit = 2 ** (bits - 1) - 1
    step = np.max(np.abs(np.asarray(x)), axis=1, keepdims=True) / np.float32(limit)
    codes = np.round(np.asarray(x) / np.where(step, step, 1)).astype(np.int64)
    want = codes @ np.asarray(w.codes.astype(jnp.int32)) * step * np.asarray(w.scale)
    np.testing.assert_allclose(contract(x, w), want, rtol=1e-6, atol=1e-7)
    assert not np.any(contract(x, w)[2])


def test_a_calibrated_scale_is_that_of_the_largest_activation_and_cuts_what_lies_beyond():
    w, x = normal((2, 16, 6)), 3 * normal((50, 16), 1)
    found = apply_to(store(activations="static"), w, x)
    np.testing.assert_allclose(found.activation_scale, np.full(2, np.max(np.abs(x)) / 127), rtol=1e-6)
    one = jax.tree.map(lambda a: a[0], found)
    np.testing.assert_allclose(contract(x, one), x @ w[0], atol=0.5)
    np.testing.assert_array_equal(contract(100 * x, one)[0], contract(1000 * x, one)[0])


def test_gradients_pass_integer_products_as_those_of_the_weight():
    w = quantized(normal((40, 9)), activation_bits=8)
    x, g = normal((3, 5, 40), 1), normal((3, 5, 9), 2)
    _, back = jax.vjp(lambda x: contract(x, w), x)
    np.testing.assert_allclose(back(g)[0], g @ materialize(w).T, rtol=1e-4, atol=1e-5)


def test_pruned_integers_stay_integers():
    w = apply_to(chain(prune(rules=KERNEL), store(activations="dynamic")), normal((2, 16, 6)))
    assert isinstance(w, Masked) and isinstance(w.weight, Quantized)
    one = jax.tree.map(lambda a: a[0], w)
    x = normal((5, 16), 1)
    assert "preferred_element_type=int32" in str(jax.make_jaxpr(contract)(x, one))
    np.testing.assert_array_equal(contract(x, one), contract(x, one.weight))


# ---- GPTQ ----


@sweep("group", [None, 16], quick=1, slow=0)
@sweep(("bits", "numbers"), [(4, "int"), (8, "int"), (4, "nf")], quick=1)
def test_gptq_errs_less_than_rounding_to_nearest_the_more_the_inputs_correlate(bits, numbers, group):
    w = normal((1, 64, 48))
    options = {"bits": bits, "numbers": numbers, "group": group}
    gains = []
    for share in (0.0, 0.6, 0.95):
        x = correlated(512, 64, share)
        found, nearest = apply_to(store(method="gptq", **options), w, x), apply_to(store(**options), w)
        assert found.codes.dtype == nearest.codes.dtype and found.scale.shape == nearest.scale.shape
        gains.append(output_error(w[0], nearest, x) / output_error(w[0], found, x))
    assert gains[0] < gains[1] < gains[2] and gains[2] > 1.3 and gains[0] > 0.97


def test_gptq_of_whole_channels_keeps_the_scales_of_rounding_to_nearest():
    w, x = normal((2, 64, 48)), correlated(512, 64, 0.8)
    found, nearest = apply_to(store(method="gptq", bits=4), w, x), quantized(w, "int4")
    np.testing.assert_allclose(found.scale, nearest.scale, rtol=1e-6)
    assert 0.05 < np.mean(found.codes.astype(jnp.int32) != nearest.codes.astype(jnp.int32)) < 0.6


@sweep("group", [None, 16], quick=1, slow=0)
@pytest.mark.parametrize("method", ["nearest", "gptq", "awq"])
@sweep(("bits", "numbers"), [(4, "int"), (4, "nf"), (8, "fp")], quick=1)
def test_masks_are_kept_whatever_rounds(method, bits, numbers, group):
    w, x = normal((2, 64, 24)), correlated(256, 64, 0.8)
    options = store(method=method, bits=bits, numbers=numbers, group=group)
    found = apply_to(chain(prune(pattern="2:4", rules=KERNEL), options), w, x)
    mask = found.weight.mask if method == "awq" else found.mask
    inner = (found.weight if method == "awq" else found).weight
    assert isinstance(inner, Quantized) and np.mean(mask) == 0.5
    assert not np.any(materialize(inner)[~mask])
    assert output_error(w[0], jax.tree.map(lambda a: a[0], found), x) < 0.9


def test_what_the_inputs_never_reach_gets_zeros_and_what_meets_no_inputs_is_rounded_to_nearest():
    w, x = normal((1, 32, 8)), normal((64, 32), 1).at[:, 5].set(0.0)
    found = apply_to(store(method="gptq", bits=4), w, x)
    assert not np.any(found.codes[0, 5].astype(jnp.int32)) and np.all(np.isfinite(materialize(found)))
    nothing = Inputs(jnp.zeros(1), jnp.zeros((1, 32)), jnp.zeros((1, 32)), jnp.zeros((1, 32, 32)))
    got, want = gptq(w, None, nothing, "int4", None).codes, quantized(w, "int4").codes
    np.testing.assert_array_equal(got.astype(jnp.int32), want.astype(jnp.int32))


# ---- AWQ and smoothing ----


def outliers(rows, features, seed=3):
    """Normal rows of which a few features are thirty times as large."""
    x = normal((rows, features), seed)
    return x.at[:, :: features // 4].mul(30.0)


@pytest.mark.parametrize("group", [None, 16])
def test_awq_is_never_worse_than_rounding_to_nearest_and_better_with_outliers(group):
    w = normal((2, 64, 48))
    for x, most in ((normal((256, 64), 1), 1.0), (outliers(256, 64), 0.8)):
        found = apply_to(store(method="awq", bits=4, group=group), w, x)
        assert isinstance(found, Scaled) and isinstance(found.weight, Quantized) and not found.trains
        for layer in range(2):
            one = jax.tree.map(lambda a, i=layer: a[i], found)
            nearest = quantized(w[layer], "int4", group)
            assert output_error(w[layer], one, x) <= most * output_error(w[layer], nearest, x) * (1 + 1e-6)


def test_smoothing_changes_nothing_by_itself_and_is_the_papers_scale():
    w, x = normal((2, 16, 6)), outliers(50, 16)
    found = apply_to(smooth(alpha=0.7, rules=KERNEL), w, x)
    largest = np.max(np.abs(x), axis=0)
    factor = largest**0.7 / np.max(np.abs(w), axis=-1) ** 0.3
    np.testing.assert_allclose(found.scale, 1 / factor, rtol=1e-5)
    np.testing.assert_allclose(found.weight, w * factor[..., None], rtol=1e-5)
    np.testing.assert_allclose(forward({"layers": {"kernel": found}}, x), x @ w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(materialize(found), w, rtol=1e-6)
    silent = apply_to(smooth(rules=KERNEL), w, x.at[:, 3].set(0.0))
    np.testing.assert_allclose(silent.scale[:, 3], 1e5, rtol=1e-5)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_smoothing_helps_integer_products_where_there_are_outliers_and_nowhere_else(activations):
    w = normal((1, 64, 48))
    naive, smoothed = store(activations=activations), chain(smooth(rules=KERNEL), store(activations=activations))
    error = {}
    for name, x in (("normal", normal((256, 64), 1)), ("outliers", outliers(256, 64))):
        for which, transform in (("naive", naive), ("smoothed", smoothed)):
            found = apply_to(transform, w, x)
            got = forward({"layers": {"kernel": found}}, x)[0]
            error[name, which] = float(jnp.linalg.norm(got - x @ w[0]) / jnp.linalg.norm(x @ w[0]))
    assert error["outliers", "smoothed"] < 0.5 * error["outliers", "naive"]
    # The null result: without outliers there is nothing to move.
    assert 0.9 < error["normal", "smoothed"] / error["normal", "naive"] < 1.2


# ---- Every kind ----


def test_quantize_of_every_kind():
    w = normal((2, 8, 12))
    sparse = apply_to(chain(prune(rules=KERNEL), store()), w)
    assert isinstance(sparse, Masked) and isinstance(sparse.weight, Quantized)
    assert not np.any(materialize(sparse)[~sparse.mask])
    thin = apply_to(chain(factorize(rank=2), store()), w)
    assert isinstance(thin.u, Quantized) and isinstance(thin.v, Quantized)
    adapted = apply_to(chain(lora(rank=2), store(bits=4, numbers="nf", group=4)), w)
    assert isinstance(adapted.base, Quantized) and adapted.base.grid == "nf4"
    assert not isinstance(adapted.a, Quantized)
    assert isinstance(apply_to(store(), Frozen(w)), Quantized)
    frozen = apply_to(store(), Frozen(LowRank(normal((2, 8, 2)), normal((2, 2, 12)))))
    assert isinstance(frozen, LowRank) and isinstance(frozen.u, Quantized)
    kept = apply_to(store(), Frozen(adapted.replace(base=w)))
    assert isinstance(kept, Frozen) and isinstance(kept.weight, Lora) and isinstance(kept.weight.base, Quantized)
    scaled = apply_to(store(), Scaled(w, jnp.ones((2, 12)), "out", trains=True))
    assert isinstance(scaled, Scaled) and scaled.trains and isinstance(scaled.weight, Quantized)
    experts = quantized(normal((2, 3, 8, 12)), "nf4", 4)
    assert experts.codes.shape == (2, 3, 8, 12) and experts.scale.shape == (2, 3, 2, 12)


def test_the_second_factor_of_a_product_is_rounded_for_what_the_first_hands_on():
    x = correlated(512, 32, 0.9)
    thin = factorize(rank=12)({"layers": {"kernel": normal((1, 32, 24))}})["layers"]["kernel"]
    found = apply_to(store(method="gptq", bits=4), thin, x)
    between = x @ thin.u[0]
    alone = apply_to(store(method="gptq", bits=4), thin.v, between)
    np.testing.assert_array_equal(found.v.codes.astype(jnp.int32), alone.codes.astype(jnp.int32))
    assert output_error(thin.v[0], found.v, between) < output_error(thin.v[0], quantized(thin.v, "int4"), between)


@pytest.mark.slow
def test_experts_are_rounded_each_for_its_own_inputs():
    w = normal((2, 3, 32, 8))
    rows = jnp.stack([jnp.stack([correlated(128, 32, 0.8, seed=3 * i + j) for j in range(3)]) for i in range(2)])
    gram = jnp.swapaxes(rows, -2, -1) @ rows
    inputs = Inputs(jnp.full((2, 3), 128.0), jnp.sum(rows**2, axis=-2), jnp.max(jnp.abs(rows), axis=-2), gram)
    transform = store(method="gptq", bits=4, group=8)
    found = transform({"layers": {"kernel": w}}, None, {"layers/kernel": inputs})["layers"]["kernel"]
    alone = gptq(w[1, 2], None, jax.tree.map(lambda a: a[1, 2], inputs), "int4", 8)
    # The batched factorisation rounds otherwise in the last bits, which may tip a code over.
    assert np.mean(found.codes[1, 2].astype(jnp.int32) != alone.codes.astype(jnp.int32)) < 0.02


@pytest.mark.parametrize("backend", ["aqt", "reference"])
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "activations": "none", "group": 4}])
def test_what_was_trained_is_stored_as_it_was_trained(backend, options):
    w = normal((2, 8, 12))
    training = quantize(mode="training", backend=backend, rules=KERNEL, **options)
    trained = apply_to(training, w)
    assert isinstance(trained, QuantAware) and trained.spec.backend == backend
    stored = apply_to(chain(training, store()), w)
    assert isinstance(stored, Quantized) and stored.grid == f"int{options['bits']}"
    assert stored.activation_bits == (None if "group" in options else options["bits"])
    np.testing.assert_array_equal(materialize(stored), materialize(trained))


def test_training_takes_its_options():
    options = quantize(mode="training", bits=4, backward_bits=None, stochastic_rounding=True, rules=KERNEL)
    spec = apply_to(options, normal((2, 8, 12))).spec
    assert spec == QuantSpec(4, True, None, None, True, "aqt")


def test_descriptions_say_what_is_done():
    described = [quantize(), quantize(bits=4, group=64, method="gptq"), quantize(activations="static"), smooth()]
    described += [quantize(numbers="fp"), quantize(mode="training", activations="none", bits=4)]
    assert [t.describe() for t in described] == [
        "int8 weights",
        "int4 weights, groups of 64, gptq",
        "int8 weights, int8 activations (static)",
        "smooth 0.5",
        "fp8 weights",
        "int4 training (aqt, weights alone)",
    ]


# ---- What is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chain(store(), store()), "quantize: .* is quantised already"),
        (lambda: chain(prune(rules=KERNEL), store(), store()), "quantize: .* is quantised already"),
        (lambda: chain(store(mode="training"), store(mode="training")), "quantize: .* is QuantAware already"),
        (
            lambda: quantize(bits=3),
            "quantize: there is no int3; numbers and bits must make one of int8, int4, nf4, fp8",
        ),
        (lambda: quantize(bits=8, numbers="nf"), "quantize: there is no nf8"),
        (lambda: quantize(mode="training", bits=16), "quantize: there is no int16"),
        (lambda: quantize(mode="training", bits=4, numbers="nf"), "quantize: mode='training' needs numbers='int'"),
        (lambda: quantize(mode="training", method="gptq"), "quantize: mode='training' needs .* method='nearest'"),
        (
            lambda: quantize(mode="training", activations="static"),
            "quantize: mode='training' has activations 'dynamic'",
        ),
        (lambda: quantize(mode="training", group=4), "quantize: activations='dynamic' needs .* group=None"),
        (lambda: quantize(activations="dynamic", numbers="fp"), "quantize: activations='dynamic' needs numbers='int'"),
        (lambda: quantize(activation_bits=3), "quantize: activation_bits is 3; it must be 4 or 8"),
        (lambda: quantize(backward_bits=2), "quantize: backward_bits is 2"),
        (lambda: quantize(group=0), "quantize: group is 0; it must be at least 1"),
        (lambda: store(group=7), "contracted axis of layers/kernel has size 16, which groups of 7 do not divide"),
        (lambda: smooth(alpha=1.5), "smooth: alpha is 1.5; it must be from 0 to 1"),
        (lambda: quantize(rules=(path_rule("scale"),)), "scale has shape .*, which is no matrix"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    params = {"layers": {"kernel": normal((3, 16, 8)), "scale": jnp.ones((3, 16))}}
    with pytest.raises(ValueError, match=message) as caught:
        make()(params)
    assert not isinstance(caught.value, RuleError)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


NEEDY = [store(activations="static"), store(method="gptq"), store(method="awq"), smooth(rules=KERNEL)]


@pytest.mark.parametrize("transform", NEEDY, ids=lambda t: t.describe())
def test_calibration_is_asked_for_and_must_be_of_use(transform):
    w, x = normal((2, 16, 6)), normal((9, 16), 1)
    with pytest.raises(CalibrationError, match="nothing is known of the inputs of layers/kernel, which"):
        apply_to(transform, w)
    with pytest.raises(CalibrationError, match="infinite or not a number; clean the data"):
        apply_to(transform, w, x.at[3, 3].set(jnp.nan))
    with pytest.raises(CalibrationError, match="never reach layers/kernel"):
        calibrated(transform, {"layers": {"kernel": w}}, None, forward, list)
    shapes = transform.abstract({"layers": {"kernel": w}})
    found = {"layers": {"kernel": apply_to(transform, w, x)}}
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), found)


def test_what_cannot_be_quantised_again_is_named():
    with pytest.raises(ValueError, match="quantize: layers/kernel is Frozen already and cannot be trained"):
        apply_to(store(mode="training"), Frozen(normal((1, 16, 6))))
    with pytest.raises(ValueError, match="smooth: layers/kernel is Quantized already; smooth comes before it"):
        apply_to(chain(store(), smooth(rules=KERNEL)), normal((1, 16, 6)), normal((9, 16), 1))


def test_a_static_scale_between_two_factors_is_not_known():
    thin = factorize(rank=2)({"layers": {"kernel": normal((1, 16, 6))}})["layers"]["kernel"]
    with pytest.raises(ValueError, match="largest activation between the factors .* choose activations='dynamic'"):
        apply_to(store(activations="static"), thin, normal((9, 16), 1))


def test_options_can_differ_by_path():
    transform = quantize(rules=(path_rule("up", bits=4, group=4), path_rule("down", numbers="fp")))
    found = transform({"layers": {"up": normal((2, 8, 6)), "down": normal((2, 6, 8))}})["layers"]
    assert (found["up"].grid, found["up"].scale.shape, found["down"].grid) == ("int4", (2, 2, 6), "fp8")
    assert dataclasses.replace(transform, rules=()).grid == "int8" and weights.storage_bytes(found["up"].codes) == 48

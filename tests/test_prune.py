"""Pruning at once: what each method, pattern and budget masks exactly, in which kinds, on a mesh, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, UP, dense_params, flat, normal, pruned_counts
from sweep import sweep

from jaxcost import sharding
from jaxcost.cost.hlo import compiled_cost
from jaxcost.models.transformer import Transformer, axes_of, initialize
from jaxcost.transforms import SET, Gradual, Iterative, RigL, calibrate, chain, factorize, lora, prune, quantize, rule
from jaxcost.transforms.masks import _wide_sum, erdos_renyi_shares
from jaxcost.weights import Dora, Frozen, Inputs, Lora, LowRank, Masked, QuantAware, Scaled, contract, materialize


def apply_to(transform, w, path="layers/kernel", inputs=None):
    """The transform of one weight with a layer axis."""
    return flat(transform({"layers": {"kernel": w}}, None, None if inputs is None else {path: inputs}))[path]


def observed(x):
    """The statistics of inputs (layers, rows, in)."""
    x = np.asarray(x, np.float32)
    return Inputs(
        jnp.full(len(x), x.shape[1], jnp.float32),
        jnp.asarray(np.sum(x**2, axis=1)),
        jnp.asarray(np.max(np.abs(x), axis=1)),
        jnp.asarray(np.einsum("lri,lrj->lij", x, x)),
    )


def outlying(layers=2, rows=256, inward=32, seed=0):
    """Inputs of which some channels are much larger than the rest, and all are mixed."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(inward) % 8 == 3, 12.0, 1.0)
    mix = np.eye(inward) + 0.3 * rng.normal(size=(inward, inward)) / inward**0.5
    return (rng.normal(size=(layers, rows, inward)) @ mix) * scale


# ---- Pruning at once ----


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.7, 0.97, 0.999])
@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 16, 24), (2, 1, 1)])
def test_prune_takes_exactly_the_smallest_of_every_matrix(sparsity, shape):
    w = normal(shape)
    got = apply_to(prune(sparsity=sparsity), w)
    size = shape[1] * shape[2]
    assert pruned_counts(got.mask) == [min(round(sparsity * size), size - 1)] * shape[0]
    assert got.weight is w
    for matrix, mask in zip(np.abs(w), np.asarray(got.mask), strict=True):
        assert np.max(matrix[~mask], initial=0) < np.min(matrix[mask])


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_prune_of_equal_weights_is_exact_and_takes_the_first(value):
    mask = apply_to(prune(sparsity=0.4), jnp.full((2, 5, 4), value)).mask
    np.testing.assert_array_equal(mask.reshape(2, 20), np.arange(20) >= 8 * np.ones((2, 1)))


def test_prune_is_exact_in_bfloat16_where_many_weights_are_equal():
    w = normal((2, 96, 80), dtype=jnp.bfloat16)
    assert len(np.unique(np.abs(np.asarray(w, np.float32)))) < 0.2 * w.size
    got = apply_to(prune(sparsity=0.3), w)
    assert pruned_counts(got.mask) == [2304, 2304]
    for matrix, mask in zip(np.abs(np.asarray(w, np.float32)), np.asarray(got.mask), strict=True):
        assert np.max(matrix[~mask]) <= np.min(matrix[mask])


def test_pruning_again_is_monotone_and_counts_what_is_pruned_already():
    w = normal((2, 9, 7)).at[0, 0].set(0.0)
    first = apply_to(prune(sparsity=0.3), w)
    # The weights that the first mask took are now the largest, and still go first.
    second = apply_to(prune(sparsity=0.6), first.replace(weight=jnp.where(first.mask, w, 99.0)))
    assert pruned_counts(first.mask) == [19, 19] and pruned_counts(second.mask) == [38, 38]
    assert not np.any(second.mask & ~first.mask)
    third = apply_to(prune(sparsity=0.1), second)
    np.testing.assert_array_equal(third.mask, second.mask)
    pattern = apply_to(prune(pattern="1:3"), second)
    assert not np.any(pattern.mask & ~second.mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 4), (4, 8)])
def test_n_of_m_keeps_the_n_largest_of_every_m_along_the_contracted_axis(n, m):
    w = normal((2, 16, 5))
    mask = np.asarray(apply_to(prune(pattern=f"{n}:{m}"), w).mask).reshape(2, 16 // m, m, 5)
    groups = np.abs(w).reshape(mask.shape)
    assert np.all(mask.sum(axis=2) == n)
    assert np.all(np.min(np.where(mask, groups, np.inf), axis=2) > np.max(np.where(mask, 0, groups), axis=2))


def test_n_of_m_keeps_the_first_of_equals():
    mask = apply_to(prune(pattern="2:4"), jnp.ones((1, 8, 3))).mask
    np.testing.assert_array_equal(mask[0, :, 0], [True, True, False, False] * 2)
    assert np.all(mask[..., :1] == mask)


# ---- Pruning of every kind ----


def test_prune_of_every_kind():
    params = {"layers": {"kernel": normal((2, 8, 12))}}
    half = prune(sparsity=0.5)
    adapted = flat(half(lora(rank=2)(params)))["layers/kernel"]
    assert isinstance(adapted, Lora) and isinstance(adapted.base, Masked)
    assert pruned_counts(adapted.base.mask) == [48, 48] and adapted.a.shape == (2, 8, 2)
    thin = flat(half(factorize(rank=3)(params)))["layers/kernel"]
    assert isinstance(thin, LowRank)
    assert pruned_counts(thin.u.mask) == [12, 12] and pruned_counts(thin.v.mask) == [18, 18]
    trained = flat(half(quantize(mode="training", rules=(rule("kernel"),))(params)))["layers/kernel"]
    assert isinstance(trained, QuantAware) and pruned_counts(trained.weight.mask) == [48, 48]
    frozen = apply_to(half, Frozen(params["layers"]["kernel"]))
    assert isinstance(frozen, Frozen) and pruned_counts(frozen.weight.mask) == [48, 48]
    dora = flat(half(lora(rank=2, dora=True)(params)))["layers/kernel"]
    assert isinstance(dora, Dora) and pruned_counts(dora.weight.base.mask) == [48, 48]
    scaled = apply_to(half, Scaled(params["layers"]["kernel"], jnp.ones((2, 12)), "out", trains=True))
    assert isinstance(scaled, Scaled) and scaled.trains and pruned_counts(scaled.weight.mask) == [48, 48]
    x = normal((5, 8), seed=3)
    for w in (dora, scaled):
        one = jax.tree.map(lambda a: a[0], w)
        np.testing.assert_allclose(contract(x, one), x @ materialize(one), rtol=1e-4, atol=1e-5)
    deep = apply_to(half, Frozen(Lora(LowRank(normal((2, 8, 2)), normal((2, 2, 12))), adapted.a, adapted.b)))
    assert pruned_counts(deep.weight.base.u.mask) == [8, 8]


# ---- Methods ----


def test_random_masks_have_the_number_and_differ_by_matrix_and_key():
    w = {"layers": {name: normal((3, 12, 10)) for name in "ab"}}
    transform = prune(method="random", sparsity=0.3, rules=(rule("."),))
    first, again = (flat(transform(w, jax.random.key(seed))) for seed in (0, 0))
    other = flat(transform(w, jax.random.key(1)))
    for path, got in first.items():
        assert pruned_counts(got.mask) == [36] * 3 and got.weight is flat(w)[path]
        np.testing.assert_array_equal(got.mask, again[path].mask)
        assert np.any(got.mask != other[path].mask) and np.any(got.mask[0] != got.mask[1])
    assert np.any(first["layers/a"].mask != first["layers/b"].mask)
    thin = flat(
        prune(method="random", rules=(rule("."),))({"layers": {"k": LowRank(w["layers"]["a"], normal((3, 10, 12)))}})
    )
    assert np.any(thin["layers/k"].u.mask.reshape(3, 120) != thin["layers/k"].v.mask.reshape(3, 120))


def test_wanda_takes_the_least_weight_times_input_norm_of_every_output():
    w, x = normal((2, 32, 6)), outlying()
    got = apply_to(prune(method="wanda", sparsity=0.3), w, inputs=observed(x))
    assert got.weight is w
    score = np.abs(np.asarray(w, np.float64)) * np.linalg.norm(x, axis=1)[..., None]
    smallest = np.argsort(np.argsort(score, axis=1), axis=1) < int(0.3 * 32)
    np.testing.assert_array_equal(got.mask, ~smallest)
    pattern = np.asarray(apply_to(prune(method="wanda", pattern="2:4"), w, inputs=observed(x)).mask)
    best = np.argsort(np.argsort(score.reshape(2, 8, 4, 6), axis=2), axis=2) >= 2
    np.testing.assert_array_equal(pattern.reshape(best.shape), best)
    whole = apply_to(prune(method="wanda", scope="matrix", sparsity=0.3), w, inputs=observed(x))
    assert pruned_counts(whole.mask) == [int(0.3 * 32 * 6)] * 2
    assert len(set(np.sum(whole.mask, axis=1).ravel().tolist())) > 1


def test_wanda_sees_the_inputs_as_the_weight_within_does():
    w, scale = normal((2, 8, 12)), jnp.exp(normal((2, 8), seed=1))
    found = Inputs(jnp.full((2,), 9.0), jnp.exp(normal((2, 8), seed=2)), jnp.ones((2, 8)))
    transform = prune(method="wanda", rules=(rule("kernel"),))
    whole, within = (
        transform({"layers": {"kernel": each}}, None, {"layers/kernel": found})["layers"]["kernel"]
        for each in (w * scale[..., None], Scaled(w, scale))
    )
    np.testing.assert_array_equal(within.weight.mask, whole.mask)


def test_an_expert_that_met_nothing_is_pruned_by_magnitude():
    w, x = normal((2, 32, 6)), outlying()
    silent = jax.tree.map(lambda a: a.at[1].set(0.0), observed(x))
    got = apply_to(prune(method="wanda"), w, inputs=silent)
    np.testing.assert_array_equal(got.mask[1], apply_to(prune(scope="output"), w).mask[1])
    solved = apply_to(prune(method="sparsegpt"), w, inputs=silent)
    np.testing.assert_array_equal(solved.weight[1] * solved.mask[1], w[1] * solved.mask[1])


def error_of(w, got, x):
    exact = np.einsum("lri,lio->lro", x, np.asarray(w, np.float64))
    return np.linalg.norm(
        exact - np.einsum("lri,lio->lro", x, np.asarray(materialize(got), np.float64))
    ) / np.linalg.norm(exact)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_with_outlying_inputs_sparsegpt_errs_less_than_wanda_less_than_magnitude_less_than_random(pattern):
    w, x = normal((2, 32, 24)), outlying()
    options = [{"method": "sparsegpt"}, {"method": "wanda"}, {"scope": "output"}, {"method": "random"}]
    if pattern != "unstructured":
        options[2] = {}
    errors = [error_of(w, apply_to(prune(pattern=pattern, **o), w, inputs=observed(x)), x) for o in options]
    assert errors == sorted(errors) and errors[0] < 0.95 * errors[1] and errors[1] < 0.7 * errors[2]
    assert errors[2] < 0.9 * errors[3]


def test_sparsegpt_prunes_by_blocks_and_keeps_what_is_pruned():
    w, x = normal((2, 32, 24)), outlying()
    got = apply_to(prune(method="sparsegpt", sparsity=0.4, block=16), w, inputs=observed(x))
    assert np.sum(~got.mask.reshape(2, 2, 16 * 24), axis=-1).ravel().tolist() == [int(0.4 * 16 * 24) + 1] * 4
    assert np.any(got.weight != w) and not np.any(materialize(got)[~got.mask])
    denser = apply_to(prune(method="sparsegpt", sparsity=0.6, block=16), got, inputs=observed(x))
    assert not np.any(denser.mask & ~got.mask)
    assert pruned_counts(denser.mask) == [2 * (int(0.6 * 16 * 24) + 1)] * 2
    nothing = apply_to(prune(method="sparsegpt", sparsity=0.0), w, inputs=observed(x))
    assert np.all(nothing.mask)
    np.testing.assert_allclose(nothing.weight, w, rtol=1e-6)
    both = apply_to(prune(method="sparsegpt", pattern="2:4"), denser, inputs=observed(x))
    assert not np.any(both.mask & ~denser.mask)
    assert np.all(np.sum(both.mask.reshape(2, 8, 4, 24), axis=2) <= 2)


def test_sparsegpt_goes_into_other_kinds_and_keeps_their_dtype():
    w, inputs = normal((2, 32, 24), dtype=jnp.bfloat16), observed(outlying())
    frozen = apply_to(prune(method="sparsegpt"), Frozen(w), inputs=inputs)
    assert isinstance(frozen, Frozen) and frozen.weight.weight.dtype == jnp.bfloat16
    adapted = apply_to(prune(method="sparsegpt"), Lora(w, normal((2, 32, 3)), normal((2, 3, 24))), inputs=inputs)
    assert isinstance(adapted.base, Masked) and np.any(adapted.base.weight != w)
    with pytest.raises(ValueError, match="prune: the inputs of layers/kernel/v alone are not known; prune by wanda"):
        apply_to(prune(method="wanda"), LowRank(normal((2, 32, 3)), normal((2, 3, 24))), inputs=inputs)


# ---- Patterns and scopes ----


def test_tiles_go_whole_by_their_norm():
    w = normal((2, 16, 24))
    mask = np.asarray(apply_to(prune(pattern="4x8", sparsity=0.5), w).mask).reshape(2, 4, 4, 3, 8)
    assert np.array_equal(mask.any(axis=(2, 4)), mask.all(axis=(2, 4)))
    kept, norms = mask.any(axis=(2, 4)), np.linalg.norm(np.asarray(w).reshape(mask.shape), axis=(2, 4))
    assert kept.sum(axis=(1, 2)).tolist() == [6, 6]
    for tiles, norm in zip(kept, norms, strict=True):
        assert np.max(norm[~tiles]) < np.min(norm[tiles])
    again = apply_to(prune(pattern="4x8", sparsity=0.75), apply_to(prune(sparsity=0.3), w))
    assert np.array_equal(np.sum(again.mask, axis=(1, 2)) < 0.25 * 16 * 24, [True, True])


def test_each_output_loses_as_many():
    got = apply_to(prune(scope="output", sparsity=0.25), normal((2, 16, 24)))
    assert np.all(np.sum(~np.asarray(got.mask), axis=1) == 4)


# ---- Budgets ----


def test_erdos_renyi_densities_are_in_proportion_and_keep_the_sum():
    got = flat(prune(budget="erk", sparsity=0.6)(dense_params()))
    masks = {path: w.mask for path, w in got.items() if isinstance(w, Masked)}
    total = sum(mask.size for mask in masks.values())
    assert abs(sum(int(np.sum(~mask)) for mask in masks.values()) - 0.6 * total) <= 3 * len(masks)
    kept = {path: np.mean(mask) for path, mask in masks.items()}
    query, key, up = (kept[f"layers/{name}/kernel"] for name in ("attention/query", "attention/key", "mlp/up"))
    assert query / up == pytest.approx((32 / 256) / (40 / 384), rel=0.02)
    assert key / up == pytest.approx((24 / 128) / (40 / 384), rel=0.02)
    assert np.all(np.asarray(flat(prune(budget="erk", sparsity=0.0)(dense_params()))[UP].mask))


def test_densities_above_one_are_whole_and_the_others_make_up_for_it():
    shares = erdos_renyi_shares({"thin": (64, 2), "square": (2, 32, 32), "large": (64, 64)}, 0.5)
    assert shares["thin"] == 0.0
    sizes = {"thin": 128, "square": 2048, "large": 4096}
    assert sum(shares[name] * sizes[name] for name in sizes) == pytest.approx(0.5 * sum(sizes.values()))
    assert (1 - shares["square"]) / (1 - shares["large"]) == pytest.approx(2.0)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_one_threshold_over_all_matrices(sparsity):
    params = dense_params() | {"layers": jax.tree.map(lambda a: a, dense_params()["layers"])}
    params["layers"]["mlp"]["up"]["kernel"] = 5.0 * params["layers"]["mlp"]["up"]["kernel"].at[1].multiply(0.01)
    got = flat(prune(budget="global", sparsity=sparsity)(params))
    found = [(np.abs(np.asarray(w.weight)), np.asarray(w.mask)) for w in got.values() if isinstance(w, Masked)]
    values = np.concatenate([value.ravel() for value, _ in found])
    mask = np.concatenate([mask.ravel() for _, mask in found])
    assert np.sum(~mask) == sum(3 * round(sparsity * value[0].size) for value, _ in found)
    assert np.max(values[~mask], initial=0) <= np.min(values[mask])
    if sparsity == 0.3:
        assert np.mean(got[UP].mask[1]) < 0.1 < 0.8 < np.mean(got[UP].mask[0])


def test_one_threshold_over_equal_weights_takes_the_first_matrices():
    w = {"layers": {"a": jnp.ones((2, 4, 5)), "b": jnp.ones((3, 2, 5))}}
    got = flat(prune(budget="global", sparsity=0.5, rules=(rule("."),))(w))
    np.testing.assert_array_equal(
        np.concatenate([got[p].mask.ravel() for p in ("layers/a", "layers/b")]), np.arange(70) >= 35
    )


def test_counts_go_beyond_32_bits():
    counts = jnp.full(5, 3_000_000_000, jnp.uint32)
    high, low = _wide_sum(counts)
    assert (int(high) << 16) + int(low) == 15_000_000_000


def test_a_shared_budget_goes_into_every_kind():
    params = {"layers": {"a": LowRank(normal((2, 8, 3)), normal((2, 3, 12))), "b": Frozen(normal((2, 8, 8), 1))}}
    for budget in ("erk", "global"):
        got = flat(prune(budget=budget, rules=(rule("."),))(params))
        masks = [got["layers/a"].u.mask, got["layers/a"].v.mask, got["layers/b"].weight.mask]
        assert abs(sum(int(np.sum(~mask)) for mask in masks) - 124) <= 4


# ---- Tracing and meshes ----

SOME = (rule("query|mlp/(up|down)"),)
TRANSFORMS = {
    "random": prune(method="random", sparsity=0.6, rules=SOME),
    "wanda": prune(method="wanda", sparsity=0.6, rules=SOME),
    "wanda 2:4": prune(method="wanda", pattern="2:4", rules=SOME),
    "movement": prune(method="movement", gradual=Gradual(end_step=4, initial_sparsity=0.1), rules=SOME),
    "tiles": prune(pattern="2x4", sparsity=0.6, rules=SOME),
    "per output": prune(scope="output", sparsity=0.6, rules=SOME),
    "erk": prune(budget="erk", sparsity=0.6, rules=SOME),
    "global": prune(budget="global", sparsity=0.6, rules=SOME),
    "regrow": prune(method="random", budget="erk", sparsity=0.8, regrow=RigL(end_step=100), rules=SOME),
}
WIDE = Transformer(dataclasses.replace(CONFIG, width=64, head_dim=16, mlp_width=96))


@functools.cache
def wide_params():
    return jax.jit(lambda key: initialize(WIDE, key)[0])(jax.random.key(0))


@functools.cache
def statistics():
    tokens = jax.random.randint(jax.random.key(7), (8, 16), 0, CONFIG.vocab_size)

    def forward(params, tokens):
        return WIDE.apply({"params": params}, tokens)[0]

    wanted = {path: "gram" for path in prune(rules=SOME).picked(wide_params())}
    return calibrate(forward, wide_params(), [tokens], wanted)


@sweep("name", TRANSFORMS, quick=1)
def test_a_sharded_transform_gives_what_an_unsharded_one_does_and_gathers_no_weight(name):
    transform, params, key = TRANSFORMS[name], wide_params(), jax.random.key(0)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    placed = jax.device_put(params, sharding.shardings(params, axes_of(WIDE, params), mesh))
    shapes = transform.abstract(params)
    places = sharding.shardings(shapes, axes_of(WIDE, shapes), mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(transform, out_shardings=places)
        compiled = jitted.lower(placed, key, statistics()).compile()
    got = compiled(placed, key, statistics())
    expected = jax.jit(transform)(params, key, statistics())
    assert jax.tree.structure(got) == jax.tree.structure(expected) == jax.tree.structure(shapes)
    for a, place, w in zip(jax.tree.leaves(got), jax.tree.leaves(places), jax.tree.leaves(expected), strict=True):
        assert a.sharding == place
        if a.dtype == jnp.bool_:
            np.testing.assert_array_equal(a, w)
        else:
            np.testing.assert_allclose(a, w, rtol=1e-3, atol=1e-4)
    assert "all-gather" not in compiled.as_text()
    shard_bytes = min(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed["layers"]["mlp"]))
    assert all(moved.operand_bytes < shard_bytes / 4 for moved in compiled_cost(compiled).collectives)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune(sparsity=1.0), "prune: sparsity is 1.0; it must be at least 0 and less than 1"),
        (lambda: prune(sparsity=-0.1), "prune: sparsity is -0.1"),
        (lambda: prune(sparsity=float("nan")), "prune: sparsity is nan"),
        (lambda: prune(pattern="2:5"), "prune: the contracted axis of layers/.* has size 16, which 5 does not divide"),
        (lambda: prune(pattern="4:4"), "prune: the pattern 4:4 must keep fewer than it has"),
        (lambda: prune(pattern="0:4"), "prune: the pattern 0:4 must keep fewer"),
        (lambda: prune(pattern="half"), "prune: the pattern 'half' is neither"),
        (lambda: prune(pattern="0x4"), "prune: the pattern 0x4 has empty tiles"),
        (lambda: prune(pattern="5x4"), "prune: 5x4 tiles do not divide layers/attention/key/kernel of shape 16 x 8"),
        (lambda: prune(pattern="2:4", gradual=Gradual(end_step=3)), "prune: a gradual schedule needs"),
        (lambda: prune(pattern="2:4", budget="erk"), "prune: N:M masks take the same share everywhere"),
        (lambda: prune(pattern="2:4", scope="output"), "prune: N:M masks compare neighbours"),
        (lambda: prune(pattern="2x4", scope="output"), "prune: tiles span outputs"),
        (lambda: prune(pattern="2x4", method="sparsegpt"), "prune: sparsegpt makes no tiles"),
        (lambda: prune(scope="output", method="sparsegpt"), "prune: sparsegpt compares a matrix"),
        (lambda: prune(scope="output", budget="global"), "prune: one global threshold needs scope='matrix'"),
        (lambda: prune(method="random", budget="global"), "prune: scores of random in different matrices do not"),
        (lambda: prune(method="sparsegpt", budget="global"), "prune: scores of sparsegpt in different matrices"),
        (
            lambda: prune(gradual=Gradual(end_step=3), regrow=SET(end_step=200)),
            "prune: gradual raises the sparsity",
        ),
        (
            lambda: prune(method="wanda", gradual=Gradual(end_step=3)),
            "prune: a gradual schedule needs method=",
        ),
        (lambda: prune(method="movement"), "prune: movement learns while training; give it gradual"),
        (lambda: prune(pattern="2:4", regrow=SET(end_step=200)), "prune: regrow moves single weights"),
        (lambda: prune(sparsity=0.0, regrow=SET(end_step=200)), "prune: regrow moves what is pruned"),
        (lambda: prune(block=0), "prune: block is 0; it must be at least 1"),
        (lambda: prune(damping=0.0), "prune: damping is 0.0; it must be positive"),
        (lambda: prune(gradual=Gradual(end_step=3, begin_step=3)), r"prune: end_step \(3\) must come after begin_step"),
        (lambda: prune(gradual=Gradual(end_step=3, every_steps=0)), "prune: every_steps is 0"),
        (lambda: prune(gradual=Gradual(end_step=3, initial_sparsity=1.0)), "prune: initial_sparsity is 1.0"),
        (lambda: prune(gradual=Iterative(rounds=0, every_steps=3)), "prune: rounds is 0; it must be at least 1"),
        (lambda: prune(gradual=Iterative(rounds=2, every_steps=0)), "prune: every_steps is 0"),
        (lambda: prune(gradual=Iterative(rounds=2, every_steps=1, begin_step=-1)), "prune: begin_step is -1"),
        (lambda: prune(regrow=SET(end_step=50)), r"prune: end_step \(50\) comes before connections move at all"),
        (lambda: prune(regrow=RigL(end_step=200, share=0.0)), "prune: share is 0.0; it must be above 0 and at most 1"),
        (
            lambda: prune(budget="erk", rules=(rule("mlp", sparsity=0.7), rule("kernel$"))),
            "prune: budget='erk' is shared by all matrices, but a rule sets options for layers/mlp",
        ),
        (
            lambda: prune(method="wanda"),
            "prune: nothing is known of .*, which prune 50% by wanda needs",
        ),
        (lambda: prune(method="sparsegpt"), "prune: nothing is known of the inputs of layers/"),
        (
            lambda: chain(quantize(), prune(), waive=("order",)),
            "prune: .* is quantised already; prune before quantising",
        ),
        (
            lambda: chain(prune(), quantize(), prune(), waive=("order",)),
            "prune: .* is quantised already; prune before quantising",
        ),
        (lambda: prune(rules=(rule("mlp_norm"),)), r"layers/mlp_norm/scale has shape \(3, 16\), which is no matrix"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()(dense_params())
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_what_is_done_is_said_in_words():
    described = [
        prune(pattern="2:4", method="wanda"),
        prune(pattern="16x16"),
        prune(method="movement", gradual=Gradual(end_step=5)),
        prune(gradual=Iterative(rounds=3, every_steps=5), budget="global"),
        prune(method="random", budget="erk", sparsity=0.9, regrow=RigL(end_step=300)),
        prune(scope="output"),
    ]
    assert [t.describe() for t in described] == [
        "prune 2:4 by wanda",
        "prune 50% in 16x16 tiles",
        "prune 50% by movement gradually",
        "prune 50% under one threshold in rounds",
        "prune 90% by random with Erdős-Rényi densities moved by RigL",
        "prune 50% per output",
    ]

"""Low rank: the best approximation of a matrix, or of its outputs, and ranks for all matrices under one budget."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small import normal

from jaxcost import sharding, weights
from jaxcost.transforms import CalibrationError, allocate_ranks, calibrate, calibrated, factorize, rule
from jaxcost.weights import Frozen, LowRank, materialize

PARAMS = {"layers": {"kernel": normal((2, 13, 11))}}


def apply_to(transform, w, calibration=None):
    """The transform of one weight with a layer axis."""
    return transform({"layers": {"kernel": w}}, None, calibration)["layers"]["kernel"]


# ---- Plain ----


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_factorize_is_the_best_approximation_of_its_rank(rank):
    w = normal((2, 13, 11))
    thin = apply_to(factorize(rank=rank), w)
    assert thin.u.shape == (2, 13, rank) and thin.v.shape == (2, rank, 11)
    values = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    error = np.sum((np.asarray(w, np.float64) - np.asarray(materialize(thin), np.float64)) ** 2, axis=(-2, -1))
    np.testing.assert_allclose(error, np.sum(values[:, rank:] ** 2, axis=-1), rtol=1e-5)
    # The singular values are shared evenly.
    np.testing.assert_allclose(np.sum(np.square(thin.u), axis=1), values[:, :rank], rtol=1e-5)
    np.testing.assert_allclose(np.sum(np.square(thin.v), axis=2), values[:, :rank], rtol=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_factorize_takes_the_largest_rank_within_its_share(share):
    rank = apply_to(factorize(parameters=share), normal((2, 24, 16))).u.shape[-1]
    assert rank * (24 + 16) <= share * 24 * 16 < (rank + 1) * (24 + 16)
    assert apply_to(factorize(parameters=0.01), normal((2, 24, 16))).u.shape[-1] == 1


def test_factorize_goes_into_frozen_weights():
    w = apply_to(factorize(rank=2), Frozen(normal((2, 13, 11))))
    assert isinstance(w, Frozen) and isinstance(w.weight, LowRank)


@pytest.mark.parametrize(("share", "multiple", "rank"), [(0.5, 8, 8), (0.5, 4, 12), (0.01, 4, 4), (1.0, 8, 24)])
def test_ranks_are_multiples_of_what_the_matrix_unit_wants(share, multiple, rank):
    assert apply_to(factorize(parameters=share, multiple=multiple), normal((2, 64, 40))).u.shape == (2, 64, rank)


# ---- Whitened ----


def forward(params, x):
    """x (rows, in) through every layer's kernel, side by side."""
    return jax.vmap(weights.contract, (None, 0))(x, params["layers"]["kernel"])


def outlier_inputs(features=96, rows=512, seed=2):
    """Inputs of which one channel in twelve is 20 times as large."""
    scale = jnp.ones(features).at[::12].set(20.0)
    return normal((rows, features), seed) * scale


def output_error(w, thin, x):
    exact, got = (np.asarray(x, np.float64) @ np.asarray(materialize(a), np.float64) for a in (w, thin))
    return np.linalg.norm(got - exact) / np.linalg.norm(exact)


def test_whitening_keeps_outputs_where_plain_truncation_keeps_weights():
    w, x = normal((2, 96, 64)), outlier_inputs()
    params = {"layers": {"kernel": w}}
    plain = apply_to(factorize(rank=16), w)
    whitened = calibrated(factorize(rank=16, whitened=True), params, None, forward, lambda: [x])["layers"]["kernel"]
    assert whitened.u.shape == plain.u.shape
    assert output_error(w, whitened, x) < 0.5 * output_error(w, plain, x)
    assert output_error(w, whitened, outlier_inputs(seed=3)) < 0.5 * output_error(w, plain, outlier_inputs(seed=3))
    weight_error = [np.linalg.norm(materialize(thin) - w) for thin in (plain, whitened)]
    assert weight_error[0] < weight_error[1]


def test_whitening_is_the_best_approximation_of_the_outputs():
    # The truncated SVD of the outputs themselves bounds every matrix of that rank from below (Eckart and Young).
    w, x = normal((1, 13, 11)), normal((50, 13), 1) @ normal((13, 13), 2)
    params = {"layers": {"kernel": w}}
    thin = calibrated(factorize(rank=3, whitened=True, damping=1e-7), params, None, forward, lambda: [x])
    outputs = np.asarray(x, np.float64) @ np.asarray(w[0], np.float64)
    values = np.linalg.svd(outputs, compute_uv=False)
    best = np.sqrt(np.sum(values[3:] ** 2) / np.sum(values**2))
    np.testing.assert_allclose(output_error(w, thin["layers"]["kernel"], x), best, rtol=1e-3)


@pytest.mark.parametrize("x", [jnp.zeros((4, 13)).at[:, 0].set(1.0), normal((2, 13)), 1e4 * normal((40, 13))])
def test_whitening_stands_dead_dependent_and_large_inputs(x):
    params = {"layers": {"kernel": normal((2, 13, 11))}}
    thin = calibrated(factorize(rank=4, whitened=True), params, None, forward, lambda: [x])["layers"]["kernel"]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(thin))
    if np.linalg.matrix_rank(x) <= 4:
        assert output_error(params["layers"]["kernel"], thin, x) < 0.05


@pytest.mark.slow
def test_whitening_sharded_weights_gives_what_whitening_whole_ones_does():
    x, params = (
        normal((64, 16), 1),
        {"layers": {name: {"kernel": normal((2, 16, 8), seed)} for seed, name in enumerate("abcd")}},
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    axes = jax.tree.map(lambda _: PartitionSpec("layers", "embed", "mlp"), params)
    placed = jax.device_put(params, sharding.shardings(params, axes, mesh))
    transform = factorize(rank=3, whitened=True)

    def multiplied(params, x):
        return sum(jnp.sum(forward({"layers": one}, x)) for one in params["layers"].values())

    def place(make, *arguments):
        places = sharding.shardings(jax.eval_shape(make, *arguments), axes, mesh)
        return jax.jit(make, out_shardings=places)(*arguments)

    want = calibrated(transform, params, None, multiplied, lambda: [x])
    with jax.set_mesh(mesh):
        got = calibrated(transform, placed, None, multiplied, lambda: [x], place)
    for name in "abcd":
        thin = got["layers"][name]["kernel"]
        np.testing.assert_allclose(materialize(thin), materialize(want["layers"][name]["kernel"]), rtol=1e-3, atol=1e-4)
        assert not thin.u.is_fully_replicated and not thin.v.is_fully_replicated


def test_whitening_asks_for_calibration():
    with pytest.raises(CalibrationError, match="nothing is known of the inputs of layers/kernel, which whitened low"):
        apply_to(factorize(whitened=True), normal((2, 13, 11)))


# ---- Ranks under one budget ----


def energies(w):
    values = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) ** 2
    return values.sum(axis=0) / values.sum()


def test_allocated_ranks_keep_the_most_energy_of_all_choices_with_their_parameters():
    shapes, decay = {"a": (2, 12, 12), "b": (2, 12, 20), "c": (2, 20, 8)}, {"a": 1, "b": 3, "c": 0}
    params = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        u, s, vt = np.linalg.svd(normal(shape, seed), full_matrices=False)
        values = np.arange(1, s.shape[1] + 1.0) ** -decay[name] * 10.0**seed
        params[name] = {"kernel": jnp.asarray(u * values @ vt, jnp.float32)}
    params = {"layers": params}
    budget = factorize(parameters=0.5)
    found = allocate_ranks(budget, params)
    thin = found(params)["layers"]
    ranks = {name: thin[name]["kernel"].u.shape[-1] for name in shapes}
    cost = {name: 2 * sum(shape[1:]) for name, shape in shapes.items()}
    size = sum(int(np.prod(shape)) for shape in shapes.values())

    def spent(ranks):
        return sum(cost[name] * rank for name, rank in ranks.items())

    def kept(ranks):
        return sum(energies(params["layers"][name]["kernel"])[:rank].sum() for name, rank in ranks.items())

    largest = {name: shape[1] * shape[2] // (shape[1] + shape[2]) for name, shape in shapes.items()}
    choices = [
        dict(zip(shapes, ranks, strict=True))
        for ranks in itertools.product(*(range(1, largest[name] + 1) for name in shapes))
    ]
    assert 0.4 * size < spent(ranks) <= 0.5 * size
    assert kept(ranks) >= max(kept(other) for other in choices if spent(other) <= spent(ranks)) - 1e-6
    uniform = {name: budget.rank_for(name, shape) for name, shape in shapes.items()}
    assert kept(ranks) > kept(uniform) + 0.05 and spent(uniform) <= 0.5 * size
    assert len(set(ranks.values())) > 1
    # What was resolved on the values is a transform as any other: its shapes need no values.
    assert jax.tree.map(jnp.shape, found(params)) == jax.tree.map(jnp.shape, found.abstract(params))
    assert eval(repr(found), {"factorize": factorize, "Rule": type(found.rules[0])}) == found


def test_allocation_keeps_what_a_rule_fixes_and_the_options_of_rules():
    params = {"layers": {name: {"kernel": normal((2, 24, 24), seed)} for seed, name in enumerate("abcd")}}
    rules = (rule("/a/", rank=2), rule("/b/", skip=True), rule("/c/", multiple=4), rule("kernel$"))
    found = allocate_ranks(factorize(rules=rules, parameters=0.6, multiple=2), params)
    thin = found(params)["layers"]
    assert thin["a"]["kernel"].u.shape[-1] == 2 and not isinstance(thin["b"]["kernel"], LowRank)
    ranks = [thin[name]["kernel"].u.shape[-1] for name in "cd"]
    assert ranks[0] % 4 == 0 and ranks[1] % 2 == 0
    assert sum(ranks) * 48 <= 0.6 * 2 * 24 * 24


def test_whitened_allocation_follows_the_outputs():
    # Both weights are alike, but one of them sees inputs of low rank, so that little of it is needed.
    w = normal((1, 32, 32))
    params = {"layers": {"a": {"kernel": w}, "b": {"kernel": w}}}
    few, many = normal((200, 3), 1) @ normal((3, 32), 2), normal((200, 32), 3)

    def watched(params, x):
        a, b = (jax.vmap(weights.contract, (None, 0))(x[i], params["layers"][n]["kernel"]) for i, n in enumerate("ab"))
        return jnp.sum(a) + jnp.sum(b)

    transform = factorize(whitened=True, parameters=0.5)
    wanted = {f"layers/{name}/kernel": "gram" for name in "ab"}
    statistics = calibrate(watched, params, [jnp.stack([few, many])], wanted)
    ranks = {path: one.rank for path, one in allocate_ranks(transform, params, statistics).picked(params).items()}
    assert ranks["layers/a/kernel"] <= 4 < ranks["layers/b/kernel"]
    with pytest.raises(CalibrationError, match="allocate_ranks: nothing is known of the inputs of layers/a/kernel"):
        allocate_ranks(transform, params)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: factorize(multiple=0), "factorize: multiple is 0"),
        (lambda: factorize(rank=6, multiple=4), "factorize: rank 6 is no multiple of 4"),
        (lambda: factorize(damping=0.0), "factorize: damping is 0.0"),
        (lambda: factorize(multiple=8), r"no rank that is a multiple of 8 costs less than layers/kernel \(13 x 11\)"),
        (lambda: allocate_ranks(factorize(parameters=0.1, multiple=4), PARAMS), "smallest ranks hold 67.1% .* 10.0%"),
        (lambda: allocate_ranks(factorize(), factorize(rank=2)(PARAMS)), "layers/kernel is LowRank already"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()(PARAMS)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")

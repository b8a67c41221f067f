"""Every transform: what it does exactly, to which weights, to weights of which kinds, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost import sharding, weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize
from jaxcost.transforms import (
    Gradual,
    Rule,
    RuleError,
    chain,
    factorize,
    freeze,
    lora,
    prune,
    quantize,
    rule,
)
from jaxcost.transforms.base import freeze_weight
from jaxcost.weights import Frozen, Lora, LowRank, Masked, QuantAware, Quantized, materialize

CONFIG = ModelConfig(
    vocab_size=32, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=16
)
MODEL = Transformer(CONFIG)
QUICK = {"xla_backend_optimization_level": 0}
"""For tests of what is computed and not of how: compiling is most of their time."""

KERNELS = [f"layers/attention/{name}/kernel" for name in ("key", "output", "query", "value")]
KERNELS += [f"layers/mlp/{name}/kernel" for name in ("down", "gate", "up")]
NORMS = ["final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"]
UP = "layers/mlp/up/kernel"


@functools.cache
def dense_params():
    return jax.jit(lambda key: initialize(MODEL, key)[0], compiler_options=QUICK)(jax.random.key(0))


@functools.cache
def forward():
    return jax.jit(lambda params: MODEL.apply({"params": params}, tokens())[0])


def tokens():
    return jax.random.randint(jax.random.key(7), (2, 8), 0, CONFIG.vocab_size)


def flat(params):
    found = {}
    weights.map_weights(lambda path, w: found.setdefault(path, w), params)
    return found


def pruned_counts(mask):
    return np.sum(~np.asarray(mask), axis=(-2, -1)).ravel().tolist()


def apply_to(transform, w, path="layers/kernel"):
    """The transform of one weight with a layer axis."""
    return flat(transform({"layers": {"kernel": w}}))[path]


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


# ---- LoRA ----


def test_lora_changes_nothing_at_first_and_trains_adapters_alone():
    params = lora(rank=4, alpha=6.0)(dense_params(), jax.random.key(3))
    np.testing.assert_array_equal(forward()(params), forward()(dense_params()))
    trainable, frozen = weights.partition(params)
    assert trainable.keys() == {f"{path}/{name}" for path in KERNELS for name in "ab"}
    assert all(not np.any(leaf) for path, leaf in trainable.items() if path.endswith("/b"))
    for path, w in flat(params).items():
        if path in KERNELS:
            *_, inward, outward = w.base.shape
            assert w.scale == 1.5 and w.a.shape == (3, inward, 4) and w.b.shape == (3, 4, outward)
            largest = np.max(np.abs(w.a))
            assert 0.9 * inward**-0.5 < largest <= inward**-0.5
            assert np.all(np.std(w.a, axis=(1, 2)) > 0) and np.any(w.a[0] != w.a[1])
        else:
            assert isinstance(w, Frozen)


@pytest.mark.parametrize("before", [prune(), factorize(), quantize(), quantize(mode="training"), freeze()])
def test_lora_on_every_kind_keeps_what_it_means_and_freezes_it(before):
    params = before(dense_params())
    adapted = flat(lora(rank=2)(params))
    for path, w in flat(params).items():
        if path.endswith("kernel") and "layers/" in path:
            assert isinstance(adapted[path], Lora) and not isinstance(adapted[path].base, Frozen)
            np.testing.assert_array_equal(materialize(adapted[path]), materialize(w))
            base = [name for name in weights.partition(adapted[path])[0] if name.startswith("base")]
            assert not base


def test_each_weight_takes_its_random_values_from_its_own_path():
    everything = flat(lora()(dense_params(), jax.random.key(1)))
    up_alone = flat(lora(rules=(rule("mlp/up"),))(dense_params(), jax.random.key(1)))
    other_key = flat(lora()(dense_params(), jax.random.key(2)))
    np.testing.assert_array_equal(everything[UP].a, up_alone[UP].a)
    assert np.any(everything[UP].a != other_key[UP].a)
    assert np.any(everything[UP].a != everything["layers/mlp/gate/kernel"].a)


# ---- Low rank ----


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


# ---- Quantisation ----


def test_quantize_errs_by_half_a_step_at_most_and_keeps_zeros():
    w = normal((2, 33, 9)).at[:, ::3].set(0.0).at[:, :, 4].set(0.0)
    q = apply_to(quantize(rules=(rule("kernel"),)), w)
    assert q.codes.dtype == jnp.int8 and q.scale.shape == (2, 1, 9) and q.scale.dtype == jnp.float32
    error = np.abs(np.asarray(materialize(q), np.float64) - np.asarray(w, np.float64))
    assert np.all(error <= np.asarray(q.scale, np.float64) * (0.5 + 1e-5))
    assert not np.any(q.codes[w == 0])
    largest = np.max(np.abs(q.codes), axis=1)
    assert np.all(largest[:, [0, 1, 2, 3, 5, 6, 7, 8]] == 127) and not np.any(largest[:, 4])


def test_quantize_of_every_kind():
    store = quantize(rules=(rule("kernel"),))
    w = normal((2, 8, 12))
    sparse = apply_to(chain(prune(sparsity=0.5), store), w)
    assert isinstance(sparse, Masked) and isinstance(sparse.weight, Quantized)
    np.testing.assert_array_equal(sparse.weight.codes == 0, sparse.weight.codes * sparse.mask == 0)
    assert np.all(materialize(sparse)[~sparse.mask] == 0)
    thin = apply_to(chain(factorize(rank=2), store), w)
    assert isinstance(thin.u, Quantized) and isinstance(thin.v, Quantized)
    adapted = apply_to(chain(lora(rank=2), store), w)
    assert isinstance(adapted.base, Quantized) and not isinstance(adapted.a, Quantized)
    assert isinstance(apply_to(store, Frozen(w)), Quantized)
    frozen = apply_to(store, Frozen(LowRank(normal((2, 8, 2)), normal((2, 2, 12)))))
    assert isinstance(frozen, LowRank) and isinstance(frozen.u, Quantized)
    kept = apply_to(store, Frozen(adapted.replace(base=w)))
    assert isinstance(kept, Frozen) and isinstance(kept.weight, Lora) and isinstance(kept.weight.base, Quantized)


@pytest.mark.parametrize("backend", ["aqt", "reference"])
def test_what_quantised_training_computes_with_is_what_is_stored_after_it(backend):
    w = normal((2, 8, 12))
    training = quantize(mode="training", backend=backend, rules=(rule("kernel"),))
    trained = apply_to(training, w)
    assert isinstance(trained, QuantAware) and trained.spec.backend == backend
    stored = apply_to(chain(training, quantize(rules=(rule("kernel"),))), w)
    np.testing.assert_allclose(materialize(stored), materialize(trained), rtol=1e-6)
    options = quantize(mode="training", bits=4, backward_bits=None, stochastic_rounding=True, rules=(rule("kernel"),))
    spec = apply_to(options, w).spec
    assert (spec.bits, spec.backward_bits, spec.stochastic_rounding) == (4, None, True)


# ---- Freezing ----


@pytest.mark.parametrize("tied", [False, True])
def test_freeze_keeps_the_function_and_the_gradients_of_what_trains(tied):
    config = ModelConfig(**{**vars(CONFIG), "tie_embeddings": tied})
    model = Transformer(config)
    params = jax.jit(lambda key: initialize(model, key)[0], compiler_options=QUICK)(jax.random.key(1))
    frozen = freeze(top_layers=1)(params)
    assert frozen["layers"]["mlp"]["up"]["kernel"].shape[0] == 1
    assert frozen["frozen_layers"]["mlp"]["up"]["kernel"].weight.shape[0] == 2
    trainable, rest = weights.partition(frozen)
    expected = {path for path in flat(params) if path.startswith("layers/")} | {"final_norm/scale"}
    assert trainable.keys() == expected | (set() if tied else {"unembed/kernel"})

    def loss(params):
        hidden = model.apply({"params": params}, tokens())[0]
        return jnp.sum(jnp.sin(hidden @ jnp.ones((16, 3)))), hidden

    def frozen_loss(trainable):
        return loss(weights.combine(frozen, trainable, rest))

    (_, hidden), gradient = jax.jit(jax.value_and_grad(frozen_loss, has_aux=True), compiler_options=QUICK)(trainable)
    (_, want_hidden), want = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(params)
    np.testing.assert_allclose(hidden, want_hidden, rtol=1e-5, atol=1e-5)
    want = flat(want)
    for path, got in gradient.items():
        full = want[path][2:] if path.startswith("layers/") else want[path]
        np.testing.assert_allclose(got, full, rtol=1e-4, atol=1e-5, err_msg=path)


def test_freeze_takes_more_by_rule_and_skips():
    transform = freeze(top_layers=2, rules=(rule("final_norm", skip=True), rule("embed/table")))
    got = flat(transform(dense_params()))
    assert isinstance(got["final_norm/scale"], Frozen) and isinstance(got["unembed/kernel"], Frozen)
    assert not isinstance(got["embed/table"], Frozen)
    # What does not train anyway is not wrapped.
    w = Quantized(jnp.ones((2, 3), jnp.int8), jnp.ones((1, 3)))
    assert freeze_weight(w) is w and isinstance(freeze_weight(jnp.ones(2)), Frozen)


# ---- Chains ----


def test_chain_applies_in_order_with_a_key_for_each():
    both = chain(prune(sparsity=0.5), quantize(), lora(rank=2))
    key = jax.random.key(5)
    by_hand = dense_params()
    for index, transform in enumerate(both.transforms):
        by_hand = transform(by_hand, jax.random.fold_in(key, index))
    got = both(dense_params(), key)
    assert jax.tree.structure(got) == jax.tree.structure(by_hand)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(by_hand), strict=True))
    assert isinstance(flat(got)[UP].base, Masked) and isinstance(flat(got)[UP].base.weight, Quantized)
    first, second = chain(lora(), lora()).transforms
    assert np.any(flat(first(dense_params(), jax.random.fold_in(key, 0)))[UP].a != flat(lora()(dense_params()))[UP].a)
    assert both.describe() == "prune 50% → int8 weights → LoRA rank 2" and chain().describe() == "none"
    assert chain()(dense_params()) is dense_params()


def test_the_order_of_a_chain_decides():
    pruned_then_thin = chain(prune(), factorize())
    with pytest.raises(ValueError, match="factorize comes before"):
        pruned_then_thin(dense_params())
    thin_then_pruned = flat(chain(factorize(), prune())(dense_params()))
    assert isinstance(thin_then_pruned[UP], LowRank) and isinstance(thin_then_pruned[UP].u, Masked)


def test_transforms_are_values():
    assert chain(prune(sparsity=0.5), lora()) == chain(prune(sparsity=0.5), lora())
    assert hash(chain(prune(rules=(rule("mlp", sparsity=0.7),)))) != hash(chain(prune()))
    assert eval(repr(prune(gradual=Gradual(end_step=4)))) == prune(gradual=Gradual(end_step=4))


# ---- Rules ----


def test_the_first_rule_that_matches_decides():
    transform = prune(
        rules=(rule("mlp/down", skip=True), rule("mlp/", sparsity=0.75), rule("query", pattern="2:4"), rule("kernel$")),
        sparsity=0.5,
    )
    got = flat(transform(dense_params()))
    assert not isinstance(got["layers/mlp/down/kernel"], Masked)
    assert pruned_counts(got[UP].mask) == [288] * 3
    query = got["layers/attention/query/kernel"].mask.reshape(3, 4, 4, 16)
    assert np.all(query.sum(axis=2) == 2)
    assert pruned_counts(got["unembed/kernel"].mask) == [256]
    assert not isinstance(got["embed/table"], Masked)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune(rules=(rule("nowhere"),)), "prune: the rule 'nowhere' matches no weight; the weights are embed"),
        (lambda: prune(rules=(rule("kernel$"), rule("mlp/"))), "'mlp/' only matches weights that earlier rules took"),
        (lambda: lora(rules=(rule("mlp", skip=True), rule("up"))), "'up' only matches weights that earlier rules took"),
        (lambda: rule("mlp["), r"The rule 'mlp\[' is not a regular expression: unterminated character set"),
        (
            lambda: prune(rules=(rule("mlp", rank=3),)),
            "sets rank, but the options are method, sparsity, pattern",
        ),
        (lambda: quantize(rules=(Rule("mlp", options=(("size", 2),)),)), "sets size, but the options are mode, bits"),
        (lambda: freeze(rules=(rule("nowhere"),)), "freeze: the rule 'nowhere' matches no weight"),
        (lambda: chain(prune(), lora(rules=(rule("nowhere"),))), "lora: the rule 'nowhere' matches no weight"),
    ],
)
def test_rules_that_cannot_work_are_refused_in_one_sentence(make, message):
    with pytest.raises(RuleError, match=message) as caught:
        make()(dense_params())
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_options_of_a_rule_are_checked_like_the_transforms_own():
    with pytest.raises(ValueError, match="sparsity is 1.5"):
        prune(rules=(rule("mlp", sparsity=1.5),))(dense_params())


# ---- Coverage ----


def test_coverage_has_a_row_for_every_weight():
    rows = prune(rules=(rule("down", skip=True), rule("mlp/", sparsity=0.75)), sparsity=0.5).coverage(dense_params())
    table = {row.path: row for row in rows}
    assert table.keys() == {*KERNELS, *NORMS, "embed/table", "unembed/kernel"}
    assert (table[UP].shape, table[UP].rule, table[UP].action) == ((3, 16, 24), "mlp/", "prune 75%")
    assert (table["layers/mlp/down/kernel"].rule, table["layers/mlp/down/kernel"].action) == ("down", "-")
    assert (table["embed/table"].shape, table["embed/table"].rule, table["embed/table"].action) == ((32, 16), None, "-")


def test_coverage_says_what_is_frozen_and_follows_a_chain():
    rows = chain(prune(pattern="2:4"), lora(rank=4)).coverage(dense_params())
    assert len(rows) == 2 * 12
    actions = {(row.path, row.action) for row in rows}
    assert {(UP, "prune 2:4"), (UP, "LoRA rank 4"), ("embed/table", "-"), ("embed/table", "frozen")} <= actions
    frozen = {row.path: row.action for row in freeze(top_layers=2).coverage(dense_params())}
    assert frozen[UP] == frozen["layers/mlp_norm/scale"] == frozen["unembed/kernel"] == "train the top 2 layers"
    assert frozen["embed/table"] == "frozen"
    described = [factorize(), factorize(rank=3), quantize(mode="training"), prune(gradual=Gradual(end_step=5))]
    assert [t.describe() for t in described] == [
        "low rank, 50% of the parameters",
        "low rank 3",
        "int8 training (aqt)",
        "prune 50% gradually",
    ]


# ---- Tracing, precision and meshes ----

TRANSFORMS = {
    "prune": prune(sparsity=0.6),
    "2:4": prune(pattern="2:4"),
    "gradual": prune(gradual=Gradual(end_step=4, initial_sparsity=0.1)),
    "lora": lora(rank=2),
    "factorize": factorize(parameters=0.6),
    "quantize": quantize(),
    "qlora": chain(quantize(), lora(rank=2)),
    "quantised training": quantize(mode="training"),
    "freeze": freeze(top_layers=1),
    "all": chain(factorize(parameters=0.6), prune(), quantize(), lora(rank=2)),
}


@functools.cache
def applied(name):
    return TRANSFORMS[name](dense_params())


def shapes_of(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_shapes_are_known_without_computing(name):
    abstract = jax.eval_shape(TRANSFORMS[name], shapes_of(dense_params()))
    concrete = shapes_of(applied(name))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(concrete)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_bfloat16_models_keep_their_dtype(name):
    halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), dense_params())
    got = TRANSFORMS[name](halves)
    for path, w in flat(got).items():
        has_codes = any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(w))
        dtype = jnp.float32 if has_codes else jnp.bfloat16
        assert jax.eval_shape(materialize, w).dtype == dtype, path
    for leaf, full in zip(jax.tree.leaves(weights.merge(got)), jax.tree.leaves(weights.merge(applied(name))), strict=1):
        # Rounding can swap weights of nearly the same size at a threshold, and with it what stands in a whole row of
        # a product of sparse factors.
        error = np.linalg.norm(np.asarray(leaf, np.float32) - full) / np.linalg.norm(full)
        assert error < (0.25 if name == "all" else 0.1)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_sharded_transform_gives_what_an_unsharded_one_does(name):
    transform = TRANSFORMS[name]
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    placed = jax.device_put(dense_params(), sharding.shardings(dense_params(), axes_of(MODEL, dense_params()), mesh))
    shapes = jax.eval_shape(transform, dense_params())
    places = sharding.shardings(shapes, axes_of(MODEL, shapes), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(transform, out_shardings=places, compiler_options=QUICK).lower(placed).compile()
    got = compiled(placed)
    for a, place, w in zip(jax.tree.leaves(got), jax.tree.leaves(places), jax.tree.leaves(applied(name)), strict=True):
        assert a.sharding == place
        if a.dtype in (jnp.bool_, jnp.int8):
            np.testing.assert_array_equal(a, w)
        else:
            np.testing.assert_allclose(a, w, rtol=1e-4, atol=1e-5)
    up = got["layers"]["mlp"]["up"]["kernel"]
    assert all(not leaf.is_fully_replicated for leaf in jax.tree.leaves(up) if 16 in leaf.shape or 24 in leaf.shape)
    if name in ("prune", "2:4", "gradual"):
        cost = compiled_cost(compiled)
        assert "all-gather" not in compiled.as_text()
        shard_bytes = min(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed["layers"]["mlp"]))
        assert all(c.kind == "all-reduce" and c.operand_bytes < shard_bytes / 4 for c in cost.collectives)
        assert bool(cost.collectives) == (name != "2:4")


# ---- What is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(rank=0), "lora: rank 0 does not fit layers/"),
        (lambda: lora(rank=9), "lora: rank 9 does not fit layers/attention/key/kernel of shape 16 x 8; choose .* 8."),
        (lambda: chain(lora(), lora()), "lora: .* has an adapter already"),
        (lambda: chain(lora(rules=(rule("mlp/up"),)), lora(rules=(rule("mlp/gate"),)), lora()), "an adapter already"),
        (lambda: lora(rules=(rule("final_norm"),)), r"final_norm/scale has shape \(16,\), which is no matrix; skip it"),
        (lambda: lora(rules=(rule("mlp_norm"),)), r"layers/mlp_norm/scale has shape \(3, 16\), which is no matrix"),
        (lambda: chain(quantize(), quantize()), "quantize: .* is quantised already"),
        (lambda: chain(prune(), quantize(), quantize()), "quantize: .* is quantised already"),
        (lambda: chain(quantize(mode="training"), quantize(mode="training")), "quantize: .* is QuantAware already"),
        (lambda: chain(freeze(), quantize(mode="training")), "quantize: .* is Frozen already"),
        (lambda: quantize(bits=4), "quantize: bits is 4; with mode='weights' it must be 8"),
        (lambda: quantize(mode="training", bits=16), "quantize: bits is 16; with mode='training' it must be 4 or 8"),
        (lambda: quantize(backward_bits=2), "quantize: backward_bits is 2"),
        (lambda: quantize(rules=(rule("scale"),)), "scale has shape .*, which is no matrix"),
        (lambda: factorize(rank=0), "factorize: rank is 0"),
        (
            lambda: factorize(rank=6),
            r"rank 6 of layers/attention/key/kernel \(16 x 8\) would cost more .* 5",
        ),
        (lambda: factorize(parameters=0.0), "factorize: parameters is 0.0"),
        (lambda: factorize(parameters=1.5), "factorize: parameters is 1.5"),
        (lambda: chain(factorize(), factorize()), "factorize: .* is LowRank already"),
        (lambda: chain(prune(), factorize()), "factorize: .* is Masked already"),
        (lambda: freeze(top_layers=0), "freeze: top_layers is 0, but the model has 3 layers; choose from 1 to 2"),
        (lambda: freeze(top_layers=3), "freeze: top_layers is 3"),
        (lambda: chain(freeze(), freeze()), "freeze: the model is frozen already"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()(dense_params())
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")

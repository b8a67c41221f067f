"""Every transform: what it does exactly, to which weights, to weights of which kinds, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcost import sharding, weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import (
    Gradual,
    Rule,
    RuleError,
    chain,
    factorize,
    freeze,
    ia3,
    lora,
    norm_only,
    prune,
    quantize,
    rule,
)
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
    deep = apply_to(half, Frozen(Lora(LowRank(normal((2, 8, 2)), normal((2, 2, 12))), adapted.a, adapted.b)))
    assert pruned_counts(deep.weight.base.u.mask) == [8, 8]


# ---- Pruning while training ----


def cubic(step, begin, end, first, last):
    progress = min(max((step - begin) / (end - begin), 0), 1)
    return last + (first - last) * (1 - progress) ** 3


@functools.cache
def gradual_run():
    """The masks before the first step and after each of ten, and the transform: two schedules, one from a rule."""
    transform = prune(
        rules=(
            rule("mlp/up", sparsity=0.6, gradual=Gradual(begin_step=0, end_step=5, every_steps=3)),
            rule("mlp/gate", gradual=None),
            rule("query|down"),
        ),
        sparsity=0.83,
        gradual=Gradual(begin_step=1, end_step=8, every_steps=2, initial_sparsity=0.2),
    )
    optimizer = optax.sgd(0.5)
    state = init_state(transform(dense_params()), optimizer, seed=0)
    model = Transformer(CONFIG, ExecutionConfig(unroll="never"))
    step = jax.jit(make_train_step(model, optimizer, chain(transform)), compiler_options=QUICK)
    batch = {"inputs": tokens(), "targets": tokens(), "mask": jnp.ones((2, 8))}
    states = [state]
    for _ in range(10):
        states.append(step(states[-1], batch)[0])
    return transform, [flat(state.params) for state in states]


@pytest.mark.parametrize(
    ("path", "schedule"),
    [
        ("layers/attention/query/kernel", (1, 8, 0.2, 0.83)),
        ("layers/mlp/down/kernel", (1, 8, 0.2, 0.83)),
        (UP, (0, 5, 0.0, 0.6)),
    ],
)
def test_gradual_pruning_follows_the_cubic_in_a_jitted_train_step(path, schedule):
    begin, end, first, last = schedule
    every = 3 if path == UP else 2
    _, states = gradual_run()
    masks = [state[path].mask for state in states]
    size = masks[0][0].size
    expected = round(first * size)
    assert pruned_counts(masks[0]) == [expected] * 3
    moves = 0
    for step, (before, after) in enumerate(zip(masks, masks[1:], strict=False)):
        if begin <= step <= end and ((step - begin) % every == 0 or step == end):
            expected = max(expected, round(cubic(step, begin, end, first, last) * size))
            moves += 1
        assert pruned_counts(after) == [expected] * 3, step
        assert not np.any(after & ~before), step
    assert moves >= 3
    assert pruned_counts(masks[-1]) == [round(last * size)] * 3


def test_gradual_masks_follow_the_weights_as_they_train():
    _, states = gradual_run()
    before, after = states[1]["layers/attention/query/kernel"], states[2]["layers/attention/query/kernel"]
    assert np.any(before.weight != after.weight)
    trained = np.abs(np.where(before.mask, after.weight, 0))
    for matrix, mask in zip(trained, np.asarray(after.mask), strict=True):
        assert np.max(matrix[~mask]) <= np.min(matrix[mask])


def test_gradual_rules_may_leave_the_schedule_out():
    transform, states = gradual_run()
    assert pruned_counts(states[0]["layers/mlp/gate/kernel"].mask) == [round(0.83 * 16 * 24)] * 3
    np.testing.assert_array_equal(states[0]["layers/mlp/gate/kernel"].mask, states[-1]["layers/mlp/gate/kernel"].mask)
    assert transform.last_step() == 8 and chain(lora(), transform).last_step() == 8
    assert prune(rules=(rule("mlp", gradual=Gradual(end_step=30)), rule("attention"))).last_step() == 30
    assert prune().last_step() == chain(prune(), quantize()).last_step() == chain().last_step() == -1


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
            "sets rank, but the options are sparsity, pattern, gradual",
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
    "groups": quantize(bits=4, numbers="nf", group=4),
    "integers": quantize(activations="dynamic"),
    "qlora": chain(quantize(), lora(rank=2)),
    "dora": lora(rank=2, dora=True, rank_stabilized=True),
    "pissa": lora(rank=2, init="pissa"),
    "ia3": ia3(),
    "norms": norm_only(),
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
        has_codes = any(leaf.dtype in (jnp.int8, jnp.int4) for leaf in jax.tree.leaves(w))
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
        if a.dtype in (jnp.bool_, jnp.int8, jnp.int4):
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
        (lambda: prune(sparsity=1.0), "prune: sparsity is 1.0; it must be at least 0 and less than 1"),
        (lambda: prune(sparsity=-0.1), "prune: sparsity is -0.1"),
        (lambda: prune(sparsity=float("nan")), "prune: sparsity is nan"),
        (lambda: prune(pattern="2:5"), "prune: the contracted axis of layers/.* has size 16, which 5 does not divide"),
        (lambda: prune(pattern="4:4"), "prune: the pattern 4:4 must keep fewer than it has"),
        (lambda: prune(pattern="0:4"), "prune: the pattern 0:4 must keep fewer"),
        (lambda: prune(pattern="half"), "prune: the pattern 'half' is neither"),
        (lambda: prune(pattern="2:4", gradual=Gradual(end_step=3)), "prune: a gradual schedule needs"),
        (lambda: prune(gradual=Gradual(end_step=3, begin_step=3)), r"prune: end_step \(3\) must come after begin_step"),
        (lambda: prune(gradual=Gradual(end_step=3, every_steps=0)), "prune: every_steps is 0"),
        (lambda: prune(gradual=Gradual(end_step=3, initial_sparsity=1.0)), "prune: initial_sparsity is 1.0"),
        (lambda: chain(quantize(), prune()), "prune: .* is quantised already; prune before quantising"),
        (lambda: chain(prune(), quantize(), prune()), "prune: .* is quantised already; prune before quantising"),
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

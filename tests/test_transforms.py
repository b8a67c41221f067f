"""Every transform: what it does exactly, to which weights, to weights of which kinds, and what it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import KERNELS, MODEL, UP, dense_params, flat, pruned_counts, tokens
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.models.transformer import axes_of
from jaxcost.transforms import (
    Gradual,
    Rule,
    RuleError,
    calibrate,
    chain,
    factorize,
    freeze,
    ia3,
    lora,
    norm_only,
    prune,
    quantize,
    rule,
    smooth,
)
from jaxcost.weights import LowRank, Masked, Quantized, materialize

NORMS = ["final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"]


def apply_to(transform, w, path="layers/kernel"):
    """The transform of one weight with a layer axis."""
    return flat(transform({"layers": {"kernel": w}}))[path]


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
    pruned_then_thin = chain(prune(), factorize(), waive=("order",))
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
DECOMPOSED = ("factorize", "pissa", "all")


@functools.cache
def applied(name):
    return TRANSFORMS[name](dense_params())


def shapes_of(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@sweep("name", TRANSFORMS, quick=6)
def test_shapes_are_known_without_computing(name):
    abstract = jax.eval_shape(TRANSFORMS[name], shapes_of(dense_params()))
    concrete = shapes_of(applied(name))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(concrete)


@sweep("name", TRANSFORMS, quick=3)
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


@sweep("name", TRANSFORMS, quick=3)
def test_a_sharded_transform_gives_what_an_unsharded_one_does(name):
    transform = TRANSFORMS[name]
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    placed = jax.device_put(dense_params(), sharding.shardings(dense_params(), axes_of(MODEL, dense_params()), mesh))
    shapes = jax.eval_shape(transform, dense_params())
    places = sharding.shardings(shapes, axes_of(MODEL, shapes), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(transform, out_shardings=places).lower(placed).compile()
    got = compiled(placed)
    for a, place, w in zip(jax.tree.leaves(got), jax.tree.leaves(places), jax.tree.leaves(applied(name)), strict=True):
        assert a.sharding == place
        if a.dtype in (jnp.bool_, jnp.int8, jnp.int4):
            np.testing.assert_array_equal(a, w)
        else:
            # Singular vectors turn by what is rounded, over the distance of their values.
            np.testing.assert_allclose(a, w, rtol=1e-4, atol=1e-4 if name in DECOMPOSED else 1e-5)
    up = got["layers"]["mlp"]["up"]["kernel"]
    assert all(not leaf.is_fully_replicated for leaf in jax.tree.leaves(up) if 16 in leaf.shape or 24 in leaf.shape)
    if name in ("factorize", "pissa"):
        # No more than a device's own part of the factors, as it is to have it, and no matrix of the stack.
        gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", compiled.as_text())
        parts = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(got["layers"])]
        assert max(np.prod([int(n) for n in shape.split(",")]) for shape in gathered) <= max(parts)
    if name in ("prune", "2:4", "gradual"):
        cost = compiled_cost(compiled)
        assert "all-gather" not in compiled.as_text()
        shard_bytes = min(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed["layers"]["mlp"]))
        assert all(c.kind == "all-reduce" and c.operand_bytes < shard_bytes / 4 for c in cost.collectives)
        assert bool(cost.collectives) == (name != "2:4")


SOME = (rule("query|mlp/(up|down)"),)
CALIBRATED = {
    "awq": quantize(method="awq", bits=4, group=4, rules=SOME),
    "smooth": smooth(rules=SOME),
    "gptq": quantize(method="gptq", bits=4, rules=SOME),
    "sparsegpt": prune(method="sparsegpt", block=4, rules=SOME),
    "gptq by groups": quantize(method="gptq", bits=4, group=4, rules=SOME),
    "sparsegpt 2:4": prune(method="sparsegpt", pattern="2:4", rules=SOME),
}


@functools.cache
def statistics():
    def forward(params, batch):
        return MODEL.apply({"params": params}, batch)[0]

    wanted = dict.fromkeys(smooth(rules=SOME).picked(dense_params()), "gram")
    return calibrate(forward, dense_params(), [tokens()], wanted)


@sweep("name", CALIBRATED, quick=1)
def test_a_sharded_calibrated_transform_gives_the_same_and_no_device_holds_a_weight(name):
    transform, key = CALIBRATED[name], jax.random.key(0)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(dense_params(), sharding.shardings(dense_params(), axes_of(MODEL, dense_params()), mesh))
    known = jax.device_put(statistics(), sharding.replicated(mesh))
    shapes = transform.abstract(dense_params())
    places = sharding.shardings(shapes, axes_of(MODEL, shapes), mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(transform, out_shardings=places)
        compiled = jitted.lower(placed, key, known).compile()
        got = jitted(placed, key, known)
    expected = jax.jit(transform)(dense_params(), key, statistics())
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, place, w in zip(jax.tree.leaves(got), jax.tree.leaves(places), jax.tree.leaves(expected), strict=True):
        assert a.sharding == place
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(w, np.float32), rtol=1e-3, atol=1e-5)
    smallest = min(a.size for path, a in flat(dense_params()).items() if path in statistics())
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", compiled.as_text())
    assert all(np.prod([int(n) for n in shape.split(",")]) < smallest for shape in gathered)


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
        (lambda: factorize(rank=0), "factorize: rank is 0"),
        (
            lambda: factorize(rank=6),
            r"rank 6 of layers/attention/key/kernel \(16 x 8\) would cost more .* 5",
        ),
        (lambda: factorize(parameters=0.0), "factorize: parameters is 0.0"),
        (lambda: factorize(parameters=1.5), "factorize: parameters is 1.5"),
        (lambda: chain(factorize(), factorize()), "factorize: .* is LowRank already"),
        (lambda: chain(prune(), factorize(), waive=("order",)), "factorize: .* is Masked already"),
        (lambda: freeze(top_layers=0), "freeze: top_layers is 0, but the model has 3 layers; choose from 1 to 2"),
        (lambda: freeze(top_layers=3), "freeze: top_layers is 3"),
        (lambda: chain(freeze(), freeze()), "freeze: the model is frozen already"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()(dense_params())
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")

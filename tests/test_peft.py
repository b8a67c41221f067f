"""Parameter-efficient tuning: what trains, what the model computes with it, and adapters side by side and merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import CONFIG, KERNELS, MODEL, UP, dense_params, flat, forward, tokens
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize
from jaxcost.serving.engine import Engine
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import (
    RuleError,
    bias_only,
    chain,
    factorize,
    freeze,
    ia3,
    lora,
    merge_adapters,
    merge_losses,
    norm_only,
    prune,
    quantize,
    rule,
)
from jaxcost.transforms.base import freeze_weight
from jaxcost.weights import Adapters, Dora, Frozen, Lora, Masked, Quantized, Scaled, contract, materialize

RULES = (rule("attention/(query|value)/|mlp/"),)


def trained(params, seed=0, size=0.1):
    """The tree after some training, which moves everything that trains."""
    trainable, frozen = weights.partition(params)
    keys = jax.random.split(jax.random.key(seed), len(trainable))
    moved = {
        path: leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, (path, leaf) in zip(keys, sorted(trainable.items()), strict=True)
    }
    return weights.combine(params, moved, frozen)


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


@sweep("before", [prune(), factorize(), quantize(), quantize(mode="training"), freeze()], quick=2)
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


@sweep(
    ("options", "scale"),
    [
        ({"rank": 4, "alpha": 6.0}, 1.5),
        ({"rank": 4, "alpha": 6.0, "rank_stabilized": True}, 3.0),
        ({"rank": 4, "alpha": 6.0, "dora": True}, 1.5),
        ({"rank": 4, "alpha": 6.0, "init": "pissa"}, 1.5),
        ({"rank": 4, "alpha": 6.0, "init": "pissa", "dora": True, "rank_stabilized": True}, 3.0),
    ],
    quick=2,
)
def test_no_variant_changes_the_model_at_first(options, scale):
    params = lora(**options)(dense_params(), jax.random.key(3))
    np.testing.assert_allclose(forward()(params), forward()(dense_params()), rtol=1e-4, atol=1e-5)
    w = flat(params)[UP]
    adapter = w.weight if "dora" in options else w
    assert isinstance(w, Dora if "dora" in options else Lora) and adapter.scale == scale
    names = {"weight/a", "weight/b", "magnitude"} if "dora" in options else {"a", "b"}
    assert weights.partition(params)[0].keys() == {f"{path}/{name}" for path in KERNELS for name in names}
    assert np.any(forward()(trained(params)) != forward()(params))


def test_dora_keeps_columns_at_their_magnitude_and_its_norm_out_of_the_gradient():
    w = flat(trained(lora(rank=2, dora=True)(dense_params())))[UP]
    w = jax.tree.map(lambda a: a[0], w)
    np.testing.assert_allclose(np.linalg.norm(materialize(w), axis=0), np.abs(w.magnitude), rtol=1e-5)
    x, adapter = jax.random.normal(jax.random.key(1), (5, 16)), w.weight
    norm = np.linalg.norm(materialize(adapter), axis=0)

    def by_hand(a, b, magnitude):
        return jnp.sum(jnp.sin(x @ (adapter.base + adapter.scale * a @ b) * (magnitude / norm)))

    def ours(a, b, magnitude):
        return jnp.sum(jnp.sin(contract(x, Dora(adapter.replace(a=a, b=b), magnitude))))

    arguments = adapter.a, adapter.b, w.magnitude
    for got, want in zip(jax.grad(ours, (0, 1, 2))(*arguments), jax.grad(by_hand, (0, 1, 2))(*arguments), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_pissa_trains_the_principal_part_and_leaves_the_rest():
    w = flat(lora(rank=3, alpha=6.0, init="pissa")(dense_params()))[UP]
    dense = np.asarray(flat(dense_params())[UP], np.float64)
    values = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(w.base, compute_uv=False)[:, :3], values[:, 3:6], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(w.a, axis=1), np.sqrt(values[:, :3] / 2), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(w.b, axis=2), np.sqrt(values[:, :3] / 2), rtol=1e-4)
    # What is left is easier to round than the whole: QPiSSA errs less than QLoRA.
    rounded = [flat(t(dense_params()))[UP] for t in (chain(lora(init="pissa"), quantize()), chain(quantize(), lora()))]
    errors = [np.linalg.norm(materialize(w) - dense) for w in rounded]
    assert all(isinstance(w.base, Quantized) for w in rounded) and errors[0] < errors[1]


@pytest.mark.slow
def test_a_base_of_4_bit_codes_trains_through_a_program_compiled_ahead_of_time():
    # JAX 0.10.2 refuses such arrays to such programs on CPUs.
    optimizer = optax.sgd(0.5)
    transform = chain(quantize(numbers="nf", bits=4, group=4), lora(rank=2))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2), jax.devices()[:2])
    params = transform(dense_params())
    params = jax.device_put(params, sharding.shardings(params, axes_of(MODEL, params), mesh))
    state = init_state(params, optimizer, seed=0)
    batch = {"inputs": tokens(), "targets": tokens(), "mask": jnp.ones((2, 8))}
    step = jax.jit(make_train_step(MODEL, optimizer, transform))
    with jax.set_mesh(mesh):
        run = sharding.runnable(step, step.lower(state, batch).compile(), state, batch)
        losses = []
        for _ in range(5):
            state, metrics = run(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert np.array_equal(state.params["layers"]["mlp"]["up"]["kernel"].base.codes, flat(params)[UP].base.codes)
    plain = step.lower(init_state(dense_params(), optimizer, 0), batch).compile()
    assert sharding.runnable(step, plain, dense_params()) is plain


# ---- Several adapters at once ----


@functools.cache
def adapter_trees():
    return tuple(
        trained(lora(rank=3, alpha=alpha, rules=RULES)(dense_params(), jax.random.key(seed)), seed)
        for seed, alpha in enumerate((4.0, 6.0, 9.0))
    )


@pytest.mark.slow
def test_rows_with_adapters_of_their_own_are_served_as_each_alone():
    engine, trees = Engine(MODEL), adapter_trees()
    several = weights.stack_adapters(trees)
    prompts = [np.array([5, 7, 1, 2]), np.array([3]), np.array([5, 7, 1, 2]), np.array([9, 9, 4]), np.array([8, 2])]
    rows = [1, -1, 0, 2, 1]

    def serve(params, prompts):
        lengths = np.array([len(p) for p in prompts])
        padded = np.stack([np.pad(p, (0, 4 - len(p))) for p in prompts])
        cache = engine.start(params, batch_size=len(prompts), slots=16)
        logits, cache = engine.prefill(params, padded, lengths, cache)
        generated = engine.generate(params, prompts, max_new_tokens=6, tokens_per_dispatch=6)
        return np.asarray(logits), np.stack(generated)

    logits, generated = serve(weights.choose(several, rows), prompts)
    for row, number in enumerate(rows):
        alone = serve(dense_params() if number < 0 else trees[number], [prompts[row]] * 5)
        np.testing.assert_allclose(logits[row], alone[0][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(generated[row], alone[1][0])
    assert len({tuple(row) for row in generated[:3]}) > 1
    # Without a choice, no row has an adapter.
    np.testing.assert_allclose(forward()(several), forward()(dense_params()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_choice_for_each_row_stands_for_a_matrix_for_each_row():
    w = flat(weights.choose(weights.stack_adapters(adapter_trees()), [2, -1, 0]))[UP]
    assert isinstance(w, Adapters) and materialize(w).shape == (3, 3, 16, 24)
    w = jax.tree.map(lambda a: a[1], w)
    for shape in ((3, 16), (3, 5, 16), (3, 2, 5, 16)):
        x = jax.random.normal(jax.random.key(1), shape)
        rows = x.reshape(3, -1, 16) @ materialize(w)
        np.testing.assert_allclose(contract(x, w), rows.reshape(*shape[:-1], 24), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"chosen for 3 rows, but the activation has shape \(4, 16\)"):
        contract(jnp.ones((4, 16)), w)


@pytest.mark.slow
def test_adapters_may_be_chosen_inside_a_compiled_program_and_on_a_mesh():
    several = weights.stack_adapters(adapter_trees())

    def chosen(params, rows):
        return MODEL.apply({"params": weights.choose(params, rows)}, tokens())[0]

    want = chosen(several, jnp.array([2, 0]))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(several, sharding.shardings(several, axes_of(MODEL, several), mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(chosen)(placed, jnp.array([2, 0]))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_adapters_train_side_by_side():
    several = weights.choose(weights.stack_adapters(adapter_trees()), [0, 2])
    trainable, frozen = weights.partition(several)

    def loss(trainable):
        return jnp.sum(jnp.sin(MODEL.apply({"params": weights.combine(several, trainable, frozen)}, tokens())[0]))

    gradient = jax.jit(jax.grad(loss))(trainable)[f"{UP}/a"]
    assert np.any(gradient[:, 0]) and np.any(gradient[:, 2]) and not np.any(gradient[:, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda trees: weights.stack_adapters([]), "There are no adapters to stack"),
        (lambda trees: weights.stack_adapters([trees[0], dense_params()]), "embed/table differs between the trees"),
        (lambda trees: weights.stack_adapters([trees[0], lora(rank=3)(dense_params())]), "in some of the trees only"),
        (
            lambda trees: weights.stack_adapters([trees[0], lora(rank=5, rules=RULES)(dense_params())]),
            "The adapters of layers/.* have ranks 3, 5; stack adapters of one rank",
        ),
        (
            lambda trees: weights.stack_adapters([trees[0], lora(rank=3, rules=RULES)(trained(dense_params()))]),
            "embed/table differs between the trees",
        ),
        (
            lambda trees: weights.stack_adapters([trees[0], {"layers": trees[1]["layers"]}]),
            "The trees of weights have different parameters",
        ),
        (
            lambda trees: weights.choose(weights.stack_adapters(trees), [0, 3]),
            "There is no adapter 3; choose from 0 to 2",
        ),
        (lambda trees: weights.choose(weights.stack_adapters(trees), [-2]), "There is no adapter -2"),
        (lambda trees: weights.choose(dense_params(), [0]), "There are no adapters to choose from"),
        (lambda trees: lora()(weights.stack_adapters(trees)), "lora: .* has an adapter already"),
        (lambda trees: lora(dora=True)(trees[0]), "lora: .* has an adapter already; merge it first, or stack"),
        (lambda trees: chain(lora(dora=True), lora())(dense_params()), "lora: .* has an adapter already"),
        (lambda trees: merge_adapters()(weights.stack_adapters(trees)), "holds several adapters"),
        (lambda trees: chain(quantize(), lora(init="pissa"))(dense_params()), "is Quantized already; apply it first"),
        (lambda trees: chain(ia3(), ia3())(dense_params()), "ia3: .* has trained factors already"),
        (lambda trees: ia3(side="both"), "ia3: side is 'both'; it must be 'in' or 'out'"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(adapter_trees())
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# ---- Merging ----


@sweep("adapt", [lora(rank=3), lora(rank=3, dora=True), lora(rank=3, init="pissa"), ia3()], quick=2)
def test_merging_gives_a_plain_model_of_the_same_function(adapt):
    params = trained(adapt(dense_params()))
    merged = merge_adapters()(params)
    assert jax.tree.structure(merged) == jax.tree.structure(dense_params())
    np.testing.assert_allclose(forward()(merged), forward()(params), rtol=1e-3, atol=1e-4)
    assert max(merge_losses(params).values()) < 1e-5
    assert len(merge_losses(params)) == (3 if adapt == ia3() else 7)


@pytest.mark.slow
def test_merging_keeps_what_the_base_is_and_says_what_is_lost():
    adapt = lora(rank=3, rules=(rule("mlp/up"),))
    for cut, kind in ((quantize(), Quantized), (quantize(numbers="nf", bits=4, group=8), Quantized), (prune(), Masked)):
        params = trained(chain(cut, adapt)(dense_params()), size=1e-2)
        lost = merge_losses(params)[UP]
        with pytest.raises(ValueError, match=f"on a base that is {kind.__name__}, .* lose {lost:.0%} of its update"):
            merge_adapters()(params)
        with pytest.raises(ValueError, match="would lose part of its update"):
            jax.jit(merge_adapters())(params)
        merged = flat(merge_adapters(lossy=True)(params))[UP]
        base = flat(params)[UP].base
        assert jax.tree.structure(merged) == jax.tree.structure(base)
        wanted = materialize(flat(params)[UP])
        error = np.linalg.norm(materialize(merged) - wanted) / np.linalg.norm(wanted - materialize(base))
        np.testing.assert_allclose(lost, error, rtol=1e-5)
    np.testing.assert_array_equal(merged.mask, base.mask)
    with pytest.raises(ValueError, match="on a base that is LowRank, which cannot take an update"):
        merge_adapters(lossy=True)(chain(factorize(), adapt)(dense_params()))
    # Whatever it stands on, all of it as floats is always to be had.
    assert isinstance(weights.merge(params)["layers"]["mlp"]["up"]["kernel"], jax.Array)


@pytest.mark.slow
def test_a_small_update_merged_into_a_coarse_grid_is_lost():
    params = {"layers": {"kernel": jax.random.normal(jax.random.key(0), (2, 256, 128)) / 16}}
    losses = {}
    for name, cut in (("nf4", quantize(numbers="nf", bits=4, group=64)), ("int8", quantize())):
        adapted = trained(chain(cut, lora(rank=4))(params), size=1e-3)
        update = materialize(adapted["layers"]["kernel"]) - materialize(adapted["layers"]["kernel"].base)
        assert 0.002 < np.std(update) * 16 < 0.02
        losses[name] = merge_losses(adapted)["layers/kernel"]
    assert losses["nf4"] > 0.95 and losses["int8"] > 0.5


def test_taking_an_update_out_again_changes_weights_so_there_is_no_such_function():
    base = (jax.random.normal(jax.random.key(0), (1, 128, 128)) / 11).astype(jnp.bfloat16)
    params = trained(lora(rank=4)({"layers": {"kernel": base}}), size=0.02)
    merged = merge_adapters()(params)["layers"]["kernel"]
    w = params["layers"]["kernel"]
    again = (merged.astype(jnp.float32) - w.scale * (w.a @ w.b)).astype(jnp.bfloat16)
    assert merged.dtype == jnp.bfloat16
    assert 0.05 < np.mean(again != base) < 0.8
    assert not hasattr(weights, "unmerge")


# ---- IA3 ----


def test_ia3_changes_nothing_at_first_and_trains_a_factor_a_channel():
    params = ia3()(dense_params())
    np.testing.assert_array_equal(forward()(params), forward()(dense_params()))
    shapes = {path: leaf.shape for path, leaf in weights.partition(params)[0].items()}
    assert shapes == {
        "layers/attention/key/kernel/scale": (3, 8),
        "layers/attention/value/kernel/scale": (3, 8),
        "layers/mlp/down/kernel/scale": (3, 24),
    }
    with_norms = weights.partition(ia3(train="norm/")(dense_params()))[0]
    assert {path for path in with_norms if "norm" in path} == {path for path in flat(dense_params()) if "norm/" in path}
    w = flat(trained(ia3()(quantize()(dense_params()))))["layers/mlp/down/kernel"]
    assert isinstance(w, Scaled) and isinstance(w.weight, Quantized) and w.side == "in"


# ---- Freezing ----


@sweep("tied", [False, True], quick=1)
def test_freeze_keeps_the_function_and_the_gradients_of_what_trains(tied):
    config = ModelConfig(**{**vars(CONFIG), "tie_embeddings": tied})
    model = Transformer(config)
    params = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(1))
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

    (_, hidden), gradient = jax.jit(jax.value_and_grad(frozen_loss, has_aux=True))(trainable)
    (_, want_hidden), want = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
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


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (norm_only(), {"final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"}),
        (freeze(rules=(rule("attention/value"),), top_layers=None), {"layers/attention/value/kernel"}),
        (
            freeze(rules=(rule("layers/mlp_norm"), rule("layers/mlp/", skip=True)), top_layers=1),
            {"frozen_layers/mlp_norm/scale", "layers/mlp_norm/scale", "layers/attention_norm/scale"}
            | {path for path in KERNELS if "attention" in path},
        ),
    ],
)
def test_freeze_rules_reach_into_the_blocks(transform, expected):
    params = transform(dense_params())
    assert weights.partition(params)[0].keys() == expected
    np.testing.assert_allclose(forward()(params), forward()(dense_params()), rtol=1e-5, atol=1e-6)
    actions = {row.path: row.action for row in transform.coverage(dense_params())}
    trains = {path.removeprefix("frozen_") for path in expected}
    assert {path for path, action in actions.items() if action != "frozen"} == trains


def test_bias_only_trains_biases_and_refuses_a_model_without():
    model = Transformer(ModelConfig(32, 16, 2, 2, 2, 8, 24, norm="layer"))
    params = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))
    paths = {f"{name}/bias" for name in ("final_norm", "layers/attention_norm", "layers/mlp_norm")}
    assert weights.partition(bias_only()(params))[0].keys() == paths
    with pytest.raises(RuleError, match=r"freeze: the rule 'bias\$' matches no weight"):
        bias_only()(dense_params())

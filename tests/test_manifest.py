"""Composition: the order of a chain, and the manifest of what each step made true of the weights."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import sweep

from jaxcost import transforms, weights
from jaxcost.config import Experiment
from jaxcost.data import DataConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, initialize
from jaxcost.session import Session, load_run
from jaxcost.sharding import MeshConfig
from jaxcost.study.export import export, read_export
from jaxcost.training.config import CheckpointConfig, TrainingConfig
from jaxcost.transforms import (
    BrokenError,
    Chain,
    Gradual,
    OrderError,
    RigL,
    Transform,
    calibrated,
    chain,
    factorize,
    freeze,
    ia3,
    lora,
    merge_adapters,
    prune,
    quantize,
    rule,
    shrink,
    smooth,
)
from jaxcost.transforms.base import STAGES
from jaxcost.transforms.manifest import check, manifest
from jaxcost.weights import Lora, Masked

CONFIG = ModelConfig(
    vocab_size=32, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=16
)
UP, DOWN = "layers/mlp/up/kernel", "layers/mlp/down/kernel"
MLP = (rule("mlp/"),)
TOKENS = np.arange(16).reshape(2, 8)


@functools.cache
def dense():
    return jax.jit(lambda key: initialize(Transformer(CONFIG), key)[0])(jax.random.key(0))


class merged(Transform):
    """Stands for any step that makes every weight the dense array that it means."""

    def __call__(self, params, key=None, calibration=None):
        return weights.merge(params)


class undone(Transform):
    """Stands for any step that forgets the masks."""

    def __call__(self, params, key=None, calibration=None):
        return weights.map_weights(lambda _, w: w.weight if isinstance(w, Masked) else w, params)


def trained(params):
    """Adapters that have moved: `b` starts at zero, and a zero update breaks nothing."""

    def one(_, w):
        return w.replace(b=jnp.ones_like(w.b)) if isinstance(w, Lora) else w

    return weights.map_weights(one, params)


# ---- Order ----


def test_every_transform_has_a_place():
    kinds = [value for value in vars(transforms).values() if isinstance(value, type) and issubclass(value, Transform)]
    named = [kind for kind in kinds if kind not in (Transform, Chain)]
    assert len(named) >= 5 and all(kind.stage in STAGES for kind in named)


@pytest.mark.parametrize(
    "steps",
    [
        (prune(), factorize()),
        (quantize(), prune()),
        (quantize(), factorize()),
        (lora(), prune()),
        (quantize(), shrink()),
        (freeze(), factorize()),
        (prune(), quantize(), lora(), prune()),
        (chain(prune(), lora()), prune()),
        (quantize(mode="training"), chain(chain(prune()))),
    ],
)
def test_a_wrong_order_is_refused_in_a_sentence_unless_waived(steps):
    with pytest.raises(
        OrderError, match=r"comes before .* swap them, or allow it with waive=\('order',\)\.$"
    ) as caught:
        chain(*steps)
    assert "\n" not in str(caught.value)
    assert chain(*steps, waive=("order",)).transforms == steps


def test_the_right_orders_stand():
    chain(factorize(), prune(), lora(), quantize())
    chain(shrink(mlp=0.5), prune(), quantize(), lora())
    chain(prune(), quantize(), lora())
    chain(chain(prune(), lora()), quantize(), chain(quantize(), prune(), waive=("order",)))
    chain(freeze(), quantize())


def test_what_cannot_be_waived_is_refused():
    with pytest.raises(ValueError, match="there is no 'colour' to waive; choose from order, sparsity"):
        chain(waive=("colour",))
    with pytest.raises(ValueError, match="no invariant 'order' to waive"):
        check({}, dense(), ("order",))


def test_an_empty_chain_is_the_identity_and_promises_nothing():
    nothing = chain()
    assert nothing(dense()) is dense() and manifest(nothing(dense())) == {}
    assert calibrated(nothing, dense(), None, None, None) is dense()
    assert jax.tree.structure(nothing.abstract(dense())) == jax.tree.structure(dense())


# ---- What a manifest says ----


def test_a_manifest_measures_what_the_kinds_promise():
    params = chain(
        factorize(rules=(rule("attention/(query|key)/"),), rank=3),
        prune(rules=(rule("mlp/up"),), pattern="2:4"),
        prune(rules=(rule("mlp/down"),), sparsity=0.75),
        prune(rules=(rule("attention/query/"),), sparsity=0.25),
        quantize(rules=(rule("mlp/"), rule("attention/value"))),
        lora(rules=(rule("mlp/up"),), rank=2),
    )(dense())
    found = manifest(params)
    assert found[UP] == {"sparsity": 0.5, "pattern": "2:4", "grid": "int8"}
    assert found[DOWN] == {"sparsity": 0.75, "grid": "int8"}
    assert found["layers/attention/value/kernel"] == {"grid": "int8"}
    assert found["layers/attention/key/kernel"] == {"rank": 3}
    assert found["layers/attention/query/kernel"] == {"rank": 3}
    assert found["layers/attention/query/kernel/u"] == found["layers/attention/query/kernel/v"] == {"sparsity": 0.25}
    assert len(found) == 8
    assert json.loads(json.dumps(found)) == found


def test_the_sparsity_of_a_stack_is_that_of_its_densest_matrix():
    mask = jnp.stack([jnp.eye(4, dtype=bool), jnp.ones((4, 4), bool)])
    assert manifest({"layers": {"kernel": Masked(jnp.ones((2, 4, 4)), mask)}})["layers/kernel"]["sparsity"] == 0.0
    assert manifest({"kernel": Masked(jnp.ones((4, 4)), mask[0])}) == {"kernel": {"sparsity": 0.75, "pattern": "1:4"}}


def test_of_shapes_a_manifest_says_the_structure():
    steps = chain(prune(pattern="2:4", rules=MLP), quantize(rules=MLP), lora(rank=2))
    shapes = steps.abstract(dense())
    assert manifest(shapes)[UP] == {"sparsity": None, "grid": "int8"}
    told = []
    jax.jit(lambda params: told.append(manifest(steps(params))))(dense())
    assert told[0] == manifest(shapes)
    # What is known of the arrays can be asked of their shapes, and the other way round.
    check(manifest(steps(dense())), shapes)
    check(manifest(shapes), steps(dense()))
    with pytest.raises(BrokenError, match="sparsity None and has no mask"):
        check(manifest(shapes), jax.eval_shape(lambda: weights.merge(steps(dense()))))


# ---- What a later step may not break ----


def adapted():
    """2:4 with an adapter that has trained: a fresh one adds zero, and merging that breaks nothing."""
    return trained(chain(prune(pattern="2:4", rules=MLP), lora(rules=MLP, rank=2))(dense()))


def test_an_adapter_beside_a_sparse_base_leaves_its_promises():
    assert check(manifest(prune(pattern="2:4", rules=MLP)(dense())), adapted())[UP]["pattern"] == "2:4"


@sweep(
    "later",
    [
        (lora(rules=MLP, rank=2, dora=True),),
        (ia3(rules=MLP),),
        (smooth(rules=MLP), quantize(rules=MLP)),
        (smooth(rules=MLP), quantize(rules=MLP, bits=4), lora(rules=MLP, rank=2, dora=True)),
        (quantize(rules=MLP, method="awq"),),
        (quantize(rules=MLP, method="gptq", bits=4),),
        (lora(rules=MLP, rank=2), merge_adapters(lossy=True)),
    ],
    quick=2,
)
def test_what_is_put_around_a_mask_keeps_its_zeros(later):
    model = Transformer(CONFIG)
    steps = chain(prune(pattern="2:4", rules=MLP), *later)
    found = calibrated(steps, dense(), None, lambda w, x: model.apply({"params": w}, x)[0], lambda: [TOKENS])
    after = manifest(found)[UP]
    assert (after["sparsity"], after["pattern"]) == (0.5, "2:4")
    grids = [step for step in later if isinstance(step, quantize)]
    assert after.get("grid") == (grids[0].grid if grids else None)
    assert check(manifest(steps.abstract(dense())), found)[UP]["pattern"] == "2:4"


@pytest.mark.parametrize("apply", [lambda c, w: c(w), lambda c, w: calibrated(c, w, None, None, None)])
def test_merging_an_adapter_takes_a_pattern_to_nothing_and_is_refused(apply):
    with pytest.raises(BrokenError, match=rf"{DOWN} had sparsity 50.00% and has 0.00% after merged; leave") as caught:
        apply(chain(merged()), adapted())
    assert "\n" not in str(caught.value)
    with pytest.raises(BrokenError, match=f"{DOWN} had pattern 2:4 and has 4:4"):
        apply(chain(merged(), waive=("sparsity",)), adapted())
    assert apply(chain(merged(), waive=("sparsity", "pattern")), adapted())["layers"]["mlp"]["up"]["kernel"].ndim == 3
    assert apply(chain(chain(merged(), waive=("sparsity", "pattern"))), adapted()) is not None
    with pytest.raises(BrokenError, match="has no mask after merged"):
        chain(*STEPS, merged()).abstract(dense())


STEPS = (prune(pattern="2:4", rules=MLP), lora(rules=MLP, rank=2))


def test_a_masked_adapter_may_be_merged():
    def masked(_, w):
        return Masked(w, w.base.mask) if isinstance(w, Lora) else w

    whole = weights.map_weights(masked, adapted())
    after = check(manifest(whole), weights.merge(whole))
    # The zeros are measured where no mask is left, and are promised on.
    assert after[UP] == {"sparsity": 0.5, "pattern": "2:4"}
    with pytest.raises(BrokenError, match="had sparsity 50.00% and has 0.00%"):
        check(after, weights.merge(adapted()))


@pytest.mark.parametrize(
    ("before", "after", "name", "message"),
    [
        (prune(sparsity=0.5), undone(), "sparsity", "had sparsity 50.00% and has 0.00% after undone"),
        (prune(pattern="1:4"), undone(), "sparsity", "had sparsity 75.00% and has 0.00%"),
        (factorize(rank=3), merged(), "rank", "had rank 3 and has no factors after merged"),
        (quantize(), merged(), "grid", "had grid int8 and has no grid after merged"),
        (quantize(mode="training", backend="reference"), merged(), "grid", "had grid int8 and has no grid"),
    ],
)
def test_a_broken_invariant_is_refused_by_path_and_name_unless_waived(before, after, name, message):
    with pytest.raises(BrokenError, match=message):
        chain(before, after)(dense())
    waived = ("sparsity", "pattern", "rank") if name == "sparsity" else (name,)
    chain(before, after, waive=waived)(dense())


def test_what_is_waived_is_promised_no_longer():
    promised = manifest(prune(sparsity=0.5)(dense()))
    after = check(promised, dense(), ("sparsity",))
    assert after == {}
    check(after, dense())


@pytest.mark.slow
def test_a_sparser_mask_a_thinner_product_and_a_stack_cut_in_two_keep_what_was_promised():
    sparse = prune(pattern="2:4")(dense())
    assert check(manifest(sparse), prune(sparsity=0.8)(sparse))[UP]["sparsity"] == pytest.approx(0.8, abs=0.01)
    halves = check(manifest(sparse), freeze(top_layers=1)(sparse))
    assert halves["frozen_" + UP]["pattern"] == "2:4"
    thin, thinner = factorize(rank=4)(dense()), factorize(rank=2)(dense())
    assert check(manifest(thin), thinner)[UP]["rank"] == 2
    with pytest.raises(BrokenError, match="had rank 2 and has rank 4"):
        check(manifest(thinner), thin)


def test_a_weight_that_is_gone_breaks_its_promises():
    params = prune(rules=MLP)(dense())
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    with pytest.raises(BrokenError, match="had sparsity 50.00% and has nothing"):
        check(manifest(params), rest)


def test_a_chain_within_a_chain_is_calibrated_too():
    class needy(prune):
        def statistics(self):
            return "norms"

        def apply(self, path, w, key, inputs=None):
            assert inputs is not None
            return super().apply(path, w, key)

    model = Transformer(CONFIG)
    inner = chain(chain(needy(rules=MLP)), quantize(rules=MLP))
    found = calibrated(inner, dense(), None, lambda w, x: model.apply({"params": w}, x)[0], lambda: [TOKENS])
    assert manifest(found)[UP] == {"sparsity": 0.5, "grid": "int8"}


# ---- What travels with a checkpoint ----


def experiment(tmp_path, **changes):
    model = ModelConfig(0, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=32, max_length=16)
    data = DataConfig(name="python_text/reference", sequence_length=16, batch_size=4, data_dir=str(tmp_path / "data"))
    settings = {"training": TrainingConfig(steps=4), "checkpoint": CheckpointConfig(every_steps=2)}
    settings |= {"evaluation": EvaluationConfig(max_tokens=64), "mesh": MeshConfig()}
    return Experiment(model=model, data=data, **settings | changes)


def session_of(value):
    return Session(value, quiet=True, devices=jax.devices()[:1])


@pytest.mark.slow
def test_the_manifest_travels_with_the_checkpoint_and_is_verified_when_it_is_read(tmp_path):
    value = experiment(tmp_path, transforms=(prune(pattern="2:4", rules=MLP), quantize(rules=MLP), lora(rank=2)))
    trained = session_of(value).train(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "4" / "metadata" / "metadata"
    saved = json.loads(path.read_text())
    assert saved["manifest"] == manifest(trained.params)
    assert saved["manifest"][UP] == {"sparsity": 0.5, "pattern": "2:4", "grid": "int8"}
    load_run(tmp_path / "run", jax.devices()[:1])

    saved["manifest"][UP]["pattern"] = "1:4"
    path.write_text(json.dumps(saved))
    with pytest.raises(BrokenError, match=f"{UP} had pattern 1:4 and has 2:4 after reading"):
        load_run(tmp_path / "run", jax.devices()[:1])
    with pytest.raises(BrokenError, match="had pattern 1:4"):
        session_of(value).train(tmp_path / "run")


@dataclasses.dataclass(frozen=True)
class leaky(prune):
    """Stands for a method whose update gives pruned weights back."""

    def update(self, params, step, *rest):
        return weights.map_weights(
            lambda _, w: w.replace(mask=jnp.ones_like(w.mask)) if isinstance(w, Masked) else w, params
        )


def test_methods_that_may_give_weights_back_waive_that_themselves():
    moving = Gradual(end_step=3)
    assert prune(method="movement", gradual=moving, budget="global").waived() == ("sparsity",)
    assert chain(prune(rules=(rule("mlp", budget="global"),), method="movement", gradual=moving)).waived() != ()
    assert chain(prune(method="movement", gradual=moving), prune(budget="global")).waived() == ()


@sweep(
    "moving",
    [
        prune(rules=MLP, gradual=Gradual(end_step=3, every_steps=1), sparsity=0.8),
        prune(rules=MLP, method="movement", gradual=Gradual(end_step=3, every_steps=1), sparsity=0.8),
        prune(rules=MLP, method="random", regrow=RigL(end_step=3, every_steps=1), sparsity=0.8),
    ],
    quick=0,
)
def test_masks_that_move_while_training_keep_what_they_promise(tmp_path, moving):
    trained = session_of(experiment(tmp_path, transforms=(moving,))).train(tmp_path / "run")
    assert manifest(trained.params)[UP]["sparsity"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.slow
def test_a_training_that_loses_the_masks_stops_at_its_first_checkpoint_unless_waived(tmp_path):
    lost = leaky(pattern="2:4", rules=MLP)
    with pytest.raises(BrokenError, match="had sparsity 50.00% and has 0.00% after training"):
        session_of(experiment(tmp_path, transforms=(lost,))).train(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    waived = chain(lost, waive=("sparsity", "pattern"))
    session_of(experiment(tmp_path, transforms=(waived,))).train(tmp_path / "waived")


# ---- What travels with an export ----


@sweep(
    "steps",
    [
        chain(prune(pattern="2:4"), quantize(bits=4)),
        chain(factorize(rank=3), prune(), quantize(numbers="fp")),
        chain(prune(), quantize(numbers="nf", bits=4, group=4, rules=MLP)),
        chain(),
    ],
    quick=1,
)
def test_an_export_is_read_back_and_verified(tmp_path, steps):
    params = steps(dense())
    export(params, tmp_path / "weights.npz")
    read = read_export(tmp_path / "weights.npz", steps.abstract(dense()))
    assert manifest(read) == manifest(params)
    for one, other in zip(*map(jax.tree.leaves, map(weights.merge, (read, params))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_is_read_as_it_was_written(tmp_path):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), dense())
    export(params, tmp_path / "weights.npz")
    read = read_export(tmp_path / "weights.npz", jax.eval_shape(lambda: params))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (read, params)), strict=True))


def test_exported_adapters_are_read_onto_their_base_alone(tmp_path):
    params = adapted()
    export(params, tmp_path / "adapter.npz")
    sparse = chain(*STEPS)(dense())
    read = read_export(tmp_path / "adapter.npz", sparse)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (read, params)), strict=True))
    with pytest.raises(ValueError, match="does not hold .*; give the base"):
        read_export(tmp_path / "adapter.npz", chain(*STEPS).abstract(dense()))
    other = chain(prune(sparsity=0.3, rules=MLP), STEPS[1])(dense())
    with pytest.raises(BrokenError, match="had pattern 2:4 and has 4:4 after reading"):
        read_export(tmp_path / "adapter.npz", other)

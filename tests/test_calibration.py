"""Calibration: what a model's weights are multiplied with, gathered without a line in the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize, unembedding
from jaxcost.sharding import MeshConfig
from jaxcost.transforms import (
    CalibrationConfig,
    CalibrationError,
    Transform,
    calibrate,
    calibrated,
    chain,
    prune,
    quantize,
    rule,
)
from jaxcost.transforms.base import ALL_KERNELS
from jaxcost.transforms.calibration import _gatherer
from jaxcost.weights import Frozen, Inputs

CONFIG = ModelConfig(
    vocab_size=32, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=16
)
MODEL = Transformer(CONFIG)
UP = "layers/mlp/up/kernel"


@dataclasses.dataclass(frozen=True)
class spy(Transform):
    """Keeps what it is told of the inputs, in place of the weights."""

    rules: tuple = ALL_KERNELS
    wanted: str = "gram"

    def apply(self, path, w, key, inputs=None):
        return Frozen(w) if inputs is None else jnp.zeros_like(weights.materialize(w)) + inputs.squares[..., None]

    def statistics(self):
        return self.wanted


def params():
    return initialize(MODEL, jax.random.key(0))[0]


def forward(params, tokens):
    hidden, _ = MODEL.apply({"params": params}, tokens)
    return weights.contract(hidden, unembedding(params))


def batches(n=3, rows=4):
    return [jax.random.randint(jax.random.key(seed), (rows, 8), 0, 32) for seed in range(n)]


def inputs_of_up(params, tokens):
    """The input of `up` in every layer, by watching every product of one run."""
    found = []
    for depth in range(CONFIG.num_layers):
        # A block's feed-forward input is what the norm makes of the stream, so norms and attention are run by hand.
        cut = params | {"layers": jax.tree.map(lambda a, d=depth: a[: d + 1], params["layers"])}
        seen = []

        def watch(x, w, key=None, seen=seen, real=weights.contract):
            seen.append(x)
            return real(x, w, key)

        with pytest.MonkeyPatch.context() as patch:
            for place in ("jaxcost.weights", "jaxcost.weights.base"):
                patch.setattr(f"{place}.contract", watch)
            with jax.disable_jit():
                MODEL.apply({"params": cut}, tokens)
        found.append(
            np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in seen[7 * depth + 4 : 7 * depth + 5]])
        )
    return np.stack(found)


@pytest.mark.slow
def test_statistics_are_those_of_what_the_weights_meet():
    w = params()
    found = calibrate(forward, w, batches(), {UP: "gram", "unembed/kernel": "norms"})
    x = np.concatenate([inputs_of_up(w, batch) for batch in batches()], axis=1)
    assert set(found) == {UP, "unembed/kernel"}
    np.testing.assert_array_equal(found[UP].count, [3 * 4 * 8] * 3)
    np.testing.assert_allclose(found[UP].squares, np.sum(x**2, axis=1), rtol=1e-4)
    np.testing.assert_allclose(found[UP].largest, np.max(np.abs(x), axis=1), rtol=1e-4)
    np.testing.assert_allclose(found[UP].gram, np.einsum("lri,lrj->lij", x, x), rtol=1e-3, atol=1e-3)
    last = np.concatenate([np.asarray(MODEL.apply({"params": w}, b)[0]).reshape(-1, 16) for b in batches()])
    np.testing.assert_allclose(found["unembed/kernel"].squares, np.sum(last**2, axis=0), rtol=1e-4)
    assert found["unembed/kernel"].gram is None


@sweep("capacity", [0.0, 4.0], quick=0)
def test_each_expert_is_known_by_its_own_rows_whether_any_are_dropped_or_not(capacity):
    config = dataclasses.replace(CONFIG, num_layers=2, experts=4, experts_per_token=2, capacity_factor=capacity)
    model, names = Transformer(config), ("up", "down", "router")
    w = initialize(model, jax.random.key(0))[0]
    # One expert that is never chosen has met nothing.
    w["layers"]["mlp"]["router"]["kernel"] = w["layers"]["mlp"]["router"]["kernel"].at[0, :, 3].set(0)
    w["layers"]["mlp_norm"]["scale"] = w["layers"]["mlp_norm"]["scale"].at[0].set(0)

    def forward(params, tokens):
        return model.apply({"params": params}, tokens)[0]

    found = calibrate(forward, w, batches(2), {f"layers/mlp/{name}/kernel": "gram" for name in names})
    up, down, router = (found[f"layers/mlp/{name}/kernel"] for name in names)
    np.testing.assert_array_equal(jnp.sum(up.count, axis=1), 2 * router.count)
    np.testing.assert_array_equal(up.count[1], down.count[1])
    for name in ("squares", "gram"):
        expected = 2 * getattr(router, name)
        np.testing.assert_allclose(jnp.sum(getattr(up, name), axis=1), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jnp.max(up.largest, axis=1), router.largest, rtol=1e-5)
    # The first layer's stream is silent, so nobody has met anything there, and nothing of it goes.
    assert not np.any(up.count[0])
    stored = quantize(method="gptq", rules=(rule("mlp/(up|down)"),))(w, None, found)
    assert np.all(jnp.any(stored["layers"]["mlp"]["up"]["kernel"].codes != 0, axis=(-2, -1)))


@pytest.mark.long
def test_statistics_on_a_mesh_are_those_of_one_device():
    w = params()
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(w, sharding.shardings(w, axes_of(MODEL, w), mesh))
    wanted = {path: "gram" for path in chain(spy()).transforms[0].picked(w)}
    alone = calibrate(forward, w, batches(), wanted)
    with jax.set_mesh(mesh):
        spread = [jax.device_put(batch, sharding.batch_sharding(mesh)) for batch in batches()]
        found = calibrate(forward, placed, spread, wanted)
    for path in wanted:
        for one, other in zip(jax.tree.leaves(alone[path]), jax.tree.leaves(found[path]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_no_gradient_of_the_model_is_computed():
    w, tokens = params(), batches(1)[0]
    probe = {UP: weights.blank_inputs(w["layers"]["mlp"]["up"]["kernel"].shape, gram=True)}
    gathering = compiled_cost(_gatherer(forward).lower(probe, w, tokens).compile()).total_flops
    once = compiled_cost(jax.jit(forward).lower(w, tokens).compile()).total_flops
    products = 3 * 2 * tokens.size * CONFIG.width**2
    assert gathering <= once + products


@pytest.mark.slow
def test_each_transform_of_a_chain_sees_what_those_before_it_left():
    w = params()
    cut = prune(sparsity=0.9)
    # What the spy leaves are figures in place of weights, which no mask survives.
    got = calibrated(chain(cut, spy(), waive=("sparsity",)), w, jax.random.key(0), forward, batches)
    expected = calibrate(forward, cut(w), batches(), {UP: "norms"})[UP].squares
    np.testing.assert_allclose(weights.materialize(got["layers"]["mlp"]["up"]["kernel"])[..., 0], expected, rtol=1e-5)
    first = calibrate(forward, w, batches(), {UP: "norms"})[UP].squares
    assert np.max(np.abs(first / expected - 1)) > 0.1


def test_shapes_need_no_data():
    shapes = chain(prune(), spy(), waive=("sparsity",)).abstract(jax.eval_shape(params))
    assert shapes["layers"]["mlp"]["up"]["kernel"].shape == (3, 16, 24)


def test_statistics_add_up():
    one = calibrate(forward, params(), batches(2), {UP: "gram"})[UP]
    parts = [calibrate(forward, params(), [batch], {UP: "gram"})[UP] for batch in batches(2)]
    added = parts[0] + parts[1]
    assert isinstance(added, Inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, added)


def test_transforms_refuse_to_go_without_what_they_need():
    with pytest.raises(CalibrationError, match="nothing is known of the inputs of layers/attention/key/kernel"):
        spy()(params())


@pytest.mark.parametrize(
    ("broken", "data", "path", "message"),
    [
        (False, [], UP, "never reach layers/mlp/up/kernel"),
        (False, batches(), "embed/table", "never reach embed/table"),
        (True, batches(), UP, "infinite or not a number"),
    ],
)
def test_data_of_no_use_are_refused(broken, data, path, message):
    w = params()
    if broken:
        w["embed"]["table"] = w["embed"]["table"].at[:].set(jnp.nan)
    with pytest.raises(CalibrationError, match=message):
        calibrate(forward, w, data, {path: "gram"})


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="calibration.batches is 0"):
        CalibrationConfig(batches=0)

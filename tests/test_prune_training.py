"""Pruning while training: gradually, in rounds, by learned scores, and with connections that move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import CONFIG, UP, dense_params, flat, pruned_counts, tokens
from sweep import sweep

from jaxcost import weights
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import SET, Gradual, Iterative, RigL, chain, lora, prune, quantize, rule
from jaxcost.weights import Masked, Scored, contract, materialize


def batch():
    return {"inputs": tokens(), "targets": tokens(), "mask": jnp.ones((2, 8))}


def run(transform, steps, optimizer=None):
    """The states before the first step and after each, as flat dicts of weights, and the last optimizer's state."""
    optimizer = optimizer or optax.sgd(0.5)
    model = Transformer(CONFIG, ExecutionConfig(unroll="never"))
    state = init_state(transform(dense_params()), optimizer, seed=0)
    step = jax.jit(make_train_step(model, optimizer, chain(transform)))
    states = [state]
    for _ in range(steps):
        states.append(step(states[-1], batch())[0])
    return [flat(state.params) for state in states], states[-1].optimizer


# ---- Gradually and in rounds ----


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
    return transform, run(transform, 10)[0]


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
    assert transform.last_step() == 8 and chain(transform, lora()).last_step() == 8
    assert prune(rules=(rule("mlp", gradual=Gradual(end_step=30)), rule("attention"))).last_step() == 30
    assert prune().last_step() == chain(prune(), quantize()).last_step() == chain().last_step() == -1


def test_rounds_take_the_same_share_of_what_is_left():
    transform = prune(sparsity=0.75, gradual=Iterative(rounds=2, every_steps=3, begin_step=1), rules=(rule("mlp/"),))
    states, _ = run(transform, 6)
    counts = [pruned_counts(state[UP].mask)[0] for state in states]
    assert counts == [0, 0, 192, 192, 192, 288, 288]
    assert transform.last_step() == 4
    for before, after in zip(states, states[1:], strict=False):
        assert not np.any(after[UP].mask & ~before[UP].mask)


def test_one_threshold_over_all_matrices_rises_too():
    transform = prune(sparsity=0.8, budget="global", gradual=Gradual(end_step=4, every_steps=2), rules=(rule("mlp/"),))
    states, _ = run(transform, 5)
    last = [w for w in states[-1].values() if isinstance(w, Masked)]
    assert sum(int(np.sum(~w.mask)) for w in last) == 9 * round(0.8 * 384)
    assert len({count for w in last for count in pruned_counts(w.mask)}) > 1
    middle = [w for w in states[1].values() if isinstance(w, Masked)]
    assert 0 <= sum(int(np.sum(~w.mask)) for w in middle) < 9 * round(0.8 * 384)


def test_tiles_go_gradually():
    states, _ = run(prune(pattern="4x4", gradual=Gradual(end_step=2, every_steps=1), rules=(rule("mlp/up"),)), 3)
    mask = np.asarray(states[-1][UP].mask).reshape(3, 4, 4, 6, 4)
    assert np.array_equal(mask.any(axis=(2, 4)), mask.all(axis=(2, 4))) and mask.mean() == 0.5


# ---- Connections that move ----


@pytest.mark.parametrize("kind", [SET, RigL])
def test_connections_move_at_one_sparsity_and_new_ones_start_at_zero(kind):
    schedule = kind(end_step=6, every_steps=2, share=0.4)
    transform = prune(method="random", sparsity=0.75, regrow=schedule, rules=(rule("mlp/up|query"),))
    states, _ = run(transform, 7)
    kept = 96
    for step, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        old, new = np.asarray(before[UP].mask), np.asarray(after[UP].mask)
        assert pruned_counts(new) == [384 - kept] * 3
        if step not in (2, 4):
            np.testing.assert_array_equal(new, old)
            continue
        most = round(float(schedule.moved(step)) * kept)
        grown = new & ~old
        assert np.all(grown.sum(axis=(1, 2)) <= most) and grown.any(axis=(1, 2)).all()
        assert not np.any(np.asarray(after[UP].weight)[grown])
        # What went is smaller than what stayed.
        size = np.abs(np.asarray(after[UP].weight))
        for layer in range(3):
            gone, stayed = size[layer][old[layer] & ~new[layer]], size[layer][old[layer] & new[layer]]
            assert np.max(gone) <= np.sort(stayed)[most - len(gone)]
    assert transform.last_step() == 6


@sweep("kind", [SET, RigL], quick=1)
def test_what_is_pruned_is_forgotten_so_that_what_grows_is_new_to_the_optimizer(kind):
    schedule = kind(end_step=6, every_steps=2, share=0.4)
    transform = prune(method="random", sparsity=0.75, regrow=schedule, rules=(rule("mlp/up"),))
    states, (adam, *_) = run(transform, 3, optax.adam(1e-2))
    old, new = (np.asarray(state[UP].mask) for state in states[-2:])
    for moments in (adam.mu, adam.nu):
        found = np.asarray(moments[f"{UP}/weight"])
        assert np.any(old & ~new) and np.any(new & ~old)
        assert not np.any(found[~new]) and not np.any(found[new & ~old]) and np.all(found[new & old])
        assert np.all(moments["layers/mlp/down/kernel"])


def test_fixed_masks_of_one_budget_train_too():
    fixed = prune(sparsity=0.8, budget="erk")
    params = fixed(dense_params())
    assert fixed.update(params, jnp.zeros((), jnp.int32), {}) is params


@pytest.mark.slow
def test_the_largest_dense_gradients_grow():
    """Against the gradient of the loss where every pruned weight stands at zero and trains."""
    transform = prune(method="random", sparsity=0.75, regrow=RigL(end_step=6, every_steps=2), rules=(rule("mlp/up"),))
    states, _ = run(transform, 3)
    before, after = states[2], states[3]

    def loss(up):
        params = jax.tree.map(lambda a: a, dense_params())
        for path, w in before.items():
            *parents, last = path.split("/")
            functools.reduce(dict.__getitem__, parents, params)[last] = w
        params["layers"]["mlp"]["up"]["kernel"] = up
        hidden, _ = Transformer(CONFIG).apply({"params": params}, tokens())
        logits = contract(hidden, params["unembed"]["kernel"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens()))

    gradient = np.abs(jax.grad(loss)(materialize(before[UP])))
    old, new = np.asarray(before[UP].mask), np.asarray(after[UP].mask)
    for layer in range(3):
        grown, others = gradient[layer][new[layer] & ~old[layer]], gradient[layer][~new[layer] & ~old[layer]]
        assert len(grown) and np.min(grown) >= np.max(others) * (1 - 1e-3)


def test_the_optimizer_sees_the_gradients_of_kept_weights_alone():
    rules = (rule("mlp/up"),)
    moving = prune(method="random", sparsity=0.75, regrow=RigL(end_step=200), rules=rules)
    fixed = prune(method="random", sparsity=0.75, rules=rules)
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(1e-2))
    (moved, state), (still, expected) = run(moving, 3, optimizer), run(fixed, 3, optimizer)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert moved[-1][UP].dense_gradient and not still[-1][UP].dense_gradient
    np.testing.assert_allclose(materialize(moved[-1][UP]), materialize(still[-1][UP]), rtol=1e-4, atol=1e-6)


def test_pruned_entries_get_the_gradient_that_they_would_have_at_zero():
    w = jax.random.normal(jax.random.key(0), (7, 5))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (7, 5))
    x, cotangent = jax.random.normal(jax.random.key(2), (4, 7)), jax.random.normal(jax.random.key(3), (4, 5))
    grad = jax.grad(lambda w: jnp.sum(contract(x, Masked(w, mask, True)) * cotangent))(w)
    np.testing.assert_allclose(grad, x.T @ cotangent, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(materialize(Masked(w, mask, True)), materialize(Masked(w, mask)))


def test_what_does_not_train_cannot_move():
    transform = chain(prune(method="random", regrow=RigL(end_step=200)), lora(rank=2))
    with pytest.raises(ValueError, match="prune: layers/.*/base does not train, so regrow cannot move its weights"):
        optimizer = optax.sgd(0.1)
        state = init_state(transform(dense_params()), optimizer, seed=0)
        jax.eval_shape(make_train_step(Transformer(CONFIG), optimizer, transform), state, batch())


# ---- Learned scores ----


def test_scores_learn_what_a_change_of_their_entry_would_do():
    w, scores = (jax.random.normal(jax.random.key(seed), (7, 5)) for seed in (0, 1))
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, (7, 5))
    x, cotangent = jax.random.normal(jax.random.key(3), (4, 7)), jax.random.normal(jax.random.key(4), (4, 5))

    def f(w, scores):
        return jnp.sum(contract(x, Scored(w, mask, scores=scores)) * cotangent)

    to_w, to_scores = jax.grad(f, (0, 1))(w, scores)
    np.testing.assert_allclose(to_w, mask * (x.T @ cotangent), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_scores, w * (x.T @ cotangent), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(materialize(Scored(w, mask, scores=scores)), jnp.where(mask, w, 0.0))
    np.testing.assert_array_equal(weights.partition(Scored(w, mask, scores=scores))[0]["scores"], scores)


def test_movement_prunes_by_scores_and_lets_weights_come_back():
    transform = prune(
        method="movement", sparsity=0.8, rules=(rule("mlp/up"),), gradual=Gradual(end_step=6, every_steps=1)
    )
    states, _ = run(transform, 8)
    assert isinstance(states[0][UP], Scored) and np.all(states[0][UP].mask)
    assert pruned_counts(states[-1][UP].mask) == [round(0.8 * 384)] * 3
    came_back = 0
    for before, after in zip(states[1:7], states[2:7], strict=False):
        scores, mask = np.asarray(after[UP].scores), np.asarray(after[UP].mask)
        for layer in range(3):
            assert np.max(scores[layer][~mask[layer]], initial=-np.inf) <= np.min(scores[layer][mask[layer]])
        came_back += int(np.sum(mask & ~np.asarray(before[UP].mask)))
    assert came_back > 0
    # What is quantised afterwards keeps the mask and leaves the scores behind.
    stored = flat(quantize(rules=(rule("mlp/up"),))({"layers": {"mlp": {"up": {"kernel": states[-1][UP]}}}}))[UP]
    assert type(stored) is Masked and np.array_equal(stored.mask, states[-1][UP].mask)

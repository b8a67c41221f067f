"""Sequences of items: SASRec against its equations, the losses it is trained by, and the metrics it is judged by."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from sweep import sweep

from jaxcost import sharding
from jaxcost.config import load
from jaxcost.cost import closed_form
from jaxcost.evaluation.losses import (
    cross_entropy,
    listwise_softmax,
    pairwise_logistic,
    sampled_binary_cross_entropy,
)
from jaxcost.evaluation.ranking import Ranker, RankingScore, ranking_score, ranks_of
from jaxcost.models.config import HeadConfig, ModelConfig
from jaxcost.models.heads import Output
from jaxcost.models.transformer import Transformer, abstract, axes_of, initialize, logits, output_of, start_cache
from jaxcost.serving.engine import Engine
from jaxcost.weights import LowRank, quantized

ITEMS = 40
PRESET = load("configs/sasrec.py").model
SASREC = dataclasses.replace(PRESET, vocab_size=ITEMS, width=12, head_dim=6, num_heads=2, num_kv_heads=2, mlp_width=12)
SASREC = dataclasses.replace(SASREC, num_layers=3, max_length=16)
LENGTHS = np.array([12, 7, 1])
VALID = np.arange(12) < LENGTHS[:, None]
HISTORIES = np.where(VALID, np.random.default_rng(0).integers(1, ITEMS, (3, 12)), 0)


ODD = dataclasses.replace(SASREC, vocab_size=41, width=15, num_heads=3, num_kv_heads=3, head_dim=5, mlp_width=17)
ODD = dataclasses.replace(ODD, tie_embeddings=False)


@functools.cache
def made(config=SASREC):
    params = jax.jit(lambda key: initialize(Transformer(config), key)[0])(jax.random.key(0))
    # Norms, biases and positions that stand where they start would hide a wrong one.
    return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(jax.random.key(a.size), a.shape), params)


@functools.cache
def forward(config=SASREC):
    def scores(params, items, valid):
        hidden, _ = Transformer(config).apply({"params": params}, items, valid_BT=valid)
        return logits(config, params, hidden)

    return jax.jit(scores)


# ---- The model ----


@pytest.mark.oracles
@pytest.mark.parametrize("config", [SASREC, ODD], ids=["as published", "odd, untied"])
def test_blocks_are_those_of_the_equations(config):
    torch = pytest.importorskip("torch")
    params = jax.tree.map(lambda a: torch.as_tensor(np.array(a)), made(config))
    width, length = config.width, HISTORIES.shape[1]

    def norm(x, at):
        return torch.nn.functional.layer_norm(x, (width,), at["scale"], at["bias"], config.norm_epsilon)

    def linear(x, at):
        return x @ at["kernel"] + at["bias"]

    def attention(at):
        module = torch.nn.MultiheadAttention(width, config.num_heads, batch_first=True).eval()
        inward = [at[name] for name in ("query", "key", "value")]
        with torch.no_grad():
            module.in_proj_weight.copy_(torch.cat([one["kernel"].T for one in inward]))
            module.in_proj_bias.copy_(torch.cat([one["bias"] for one in inward]))
            module.out_proj.weight.copy_(at["output"]["kernel"].T)
            module.out_proj.bias.copy_(at["output"]["bias"])
        return module

    later = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    with torch.no_grad():
        x = params["embed"]["table"][HISTORIES] * width**0.5 + params["positions"]["table"][:length]
        for i in range(config.num_layers):
            layer = jax.tree.map(lambda a: a[i], params["layers"])  # noqa: B023
            y = norm(x, layer["attention_norm"])
            x = y + attention(layer["attention"])(y, x, x, attn_mask=later, need_weights=False)[0]
            z = norm(x, layer["mlp_norm"])
            x = z + linear(torch.relu(linear(z, layer["mlp"]["up"])), layer["mlp"]["down"])
        items = params["embed"]["table"].T if config.tie_embeddings else params["unembed"]["kernel"]
        want = (norm(x, params["final_norm"]) @ items).numpy()
    got = forward(config)(made(config), HISTORIES, VALID)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(np.asarray(got)[VALID], want[VALID], atol=2e-4)


@pytest.mark.slow
def test_the_next_items_after_a_history_are_those_of_the_full_forward():
    engine, params = Engine(Transformer(SASREC)), made()
    want = forward()(params, HISTORIES, VALID)[np.arange(3), LENGTHS - 1]
    cache = start_cache(engine.model, params, batch_size=3, slots=16)
    got, cache = engine.prefill(params, HISTORIES, LENGTHS, cache)
    np.testing.assert_allclose(got, want, atol=2e-4)
    new = engine.generate(params, [row[:n] for row, n in zip(HISTORIES, LENGTHS, strict=True)], max_new_tokens=3)
    whole = np.zeros((3, 15), int)
    for row, history, length, added in zip(whole, HISTORIES, LENGTHS, new, strict=True):
        row[: length + 3] = [*history[:length], *added]
    best = np.argmax(forward()(params, whole, np.ones(whole.shape, bool)), axis=-1)
    for row, length, added in zip(best, LENGTHS, new, strict=True):
        np.testing.assert_array_equal(added, row[length - 1 : length + 2])


@pytest.mark.slow
def test_the_stream_is_normed_and_not_what_goes_into_its_parts():
    plain = dataclasses.replace(SASREC, norm_placement="pre")
    hidden, _ = Transformer(plain).apply({"params": made()}, HISTORIES)
    got = logits(plain, made(), hidden) - forward()(made(), HISTORIES, None)
    assert np.max(np.abs(got)) > 0.1
    shapes = [jax.tree.map(lambda a: a.shape, abstract(Transformer(config))[0]) for config in (plain, SASREC)]
    assert shapes[0] == shapes[1]


def test_the_preset_is_of_the_size_that_it_says():
    assert closed_form.parameter_counts(PRESET).total == 211_950
    assert PRESET.num_heads * PRESET.head_dim == PRESET.width == PRESET.mlp_width


# ---- The losses ----


def test_a_sampled_loss_over_all_others_is_that_of_every_item():
    """Two items leave one to draw, so that nothing is random."""
    hidden, matrix, bias = small.normal((2, 5, 4)), small.normal((4, 2), 1), small.normal((2,), 2)
    targets = np.arange(10).reshape(2, 5) % 2
    mask = np.array([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], np.float32)
    total, count = sampled_binary_cross_entropy(
        hidden, Output(matrix, bias, 0.7), targets, mask, key=jax.random.key(0), negatives=2
    )
    scores = 0.7 * np.tanh((np.asarray(hidden) @ np.asarray(matrix) + np.asarray(bias)) / 0.7)
    right, wrong = (np.take_along_axis(scores, index[..., None], -1)[..., 0] for index in (targets, 1 - targets))
    want = np.log1p(np.exp(-right)) + 2 * np.log1p(np.exp(wrong))
    np.testing.assert_allclose(total, np.sum(want * mask), rtol=1e-5)
    assert count == mask.sum()


def test_negatives_are_drawn_evenly_from_all_items_but_the_target_and_padding():
    # Hidden states of one number, and items that say who they are by their scores.
    items, first = 7, 1
    matrix = jnp.log(jnp.expm1(2.0 ** jnp.arange(items)))[None]
    targets = jnp.asarray([[1, 3, 6]])

    def drawn(key):
        def nats(target):
            hidden, mask = jnp.ones((1, 1, 1)), jnp.ones((1, 1))
            total, _ = sampled_binary_cross_entropy(hidden, Output(matrix), target, mask, key=key, first=first)
            return total - jax.nn.softplus(-matrix[0, target[0, 0]])

        return jnp.stack([nats(targets[:, i : i + 1]) for i in range(3)])

    found = jnp.round(jnp.log2(jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), 3000)))).astype(int)
    for column, target in zip(np.asarray(found).T, (1, 3, 6), strict=True):
        counts = np.bincount(column, minlength=items)
        assert counts[0] == counts[target] == 0 and counts.sum() == 3000
        others = np.delete(counts, [0, target])
        assert np.all(np.abs(others - 600) < 5 * np.sqrt(600))


def test_items_that_are_chosen_score_what_they_score_among_all():
    hidden, chosen = small.normal((2, 3, 12)), np.random.default_rng(1).integers(0, ITEMS, (2, 3, 5))
    matrix = small.normal((12, ITEMS), 1)
    factors = LowRank(small.normal((12, 4), 2), small.normal((4, ITEMS), 3))
    for output in (
        output_of(SASREC, made()),
        Output(factors, small.normal((ITEMS,), 4), 2.0),
        Output(quantized(matrix)),
    ):
        want = jnp.take_along_axis(output(hidden), jnp.asarray(chosen), axis=-1)
        np.testing.assert_allclose(output.of(hidden, chosen), want, atol=1e-5)


@pytest.mark.parametrize(("options", "said"), [({"negatives": 0}, "negatives is 0"), ({"first": 3}, "of 4 ids")])
def test_nothing_to_draw_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        sampled_binary_cross_entropy(
            jnp.ones((1, 1, 2)),
            Output(jnp.ones((2, 4))),
            jnp.zeros((1, 1), int),
            jnp.ones((1, 1)),
            key=jax.random.key(0),
            **options,
        )


@sweep("loss", ["sampled", "full"], quick=0)
def test_a_recommender_learns_what_comes_next(loss):
    """Items that follow one another in a circle: after some steps the next one ranks first."""
    rows = (1 + (np.arange(16)[:, None] * 2 + np.arange(13)) % (ITEMS - 1)).astype(np.int32)
    inputs, targets, valid = rows[:, :-1], rows[:, 1:], np.ones((16, 12), bool)
    model = Transformer(SASREC)
    batch = {"inputs": inputs, "valid": valid, "targets": targets[:, -1:], "mask": np.ones((16, 1), np.float32)}
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    rank = Ranker(model, [batch], mesh, k=1, first=1)

    def nats(params, key):
        hidden, _ = model.apply({"params": params}, inputs)
        output, mask = output_of(SASREC, params), jnp.ones(targets.shape)
        if loss == "full":
            total, count = cross_entropy(hidden, output, targets, mask)
        else:
            total, count = sampled_binary_cross_entropy(hidden, output, targets, mask, key=key, negatives=4, first=1)
        return total / count

    optimizer = optax.adam(1e-2)

    @jax.jit
    def trained(params, keys):
        def step(carry, key):
            gradient = jax.grad(nats)(carry[0], key)
            updates, state = optimizer.update(gradient, carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    before, after = (rank(p) for p in (made(), trained(made(), jax.random.split(jax.random.key(1), 500))))
    assert before.hit_rate < 0.3 and after.hit_rate > 0.9


def by_hand(scores, relevance, mask):
    """Both ranking losses of one query, from their definitions."""
    kept = np.flatnonzero(mask)
    shares = np.exp(scores[kept]) / np.sum(np.exp(scores[kept]))
    listwise = -np.sum(relevance[kept] * np.log(shares))
    pairs = [(i, j) for i in kept for j in kept if relevance[i] > relevance[j]]
    return listwise, sum(np.log1p(np.exp(scores[j] - scores[i])) for i, j in pairs), len(pairs)


def test_ranking_losses_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    scores, relevance = rng.normal(size=(5, 6)), rng.integers(0, 3, (5, 6)).astype(float)
    mask = (rng.random((5, 6)) < 0.7).astype(float)
    mask[3], relevance[4] = 0, 0
    want = [by_hand(*row) for row in zip(scores, relevance, mask, strict=True)]
    listwise, queries = listwise_softmax(jnp.asarray(scores), relevance, mask)
    pairwise, pairs = pairwise_logistic(jnp.asarray(scores), relevance, mask)
    np.testing.assert_allclose(listwise, sum(one[0] for one in want), rtol=1e-5)
    np.testing.assert_allclose(pairwise, sum(one[1] for one in want), rtol=1e-5)
    assert queries == 3 and pairs == sum(one[2] for one in want)
    for loss in (listwise_softmax, pairwise_logistic):
        gradient = jax.grad(lambda s: loss(s, relevance, mask)[0])(jnp.asarray(scores))  # noqa: B023
        assert np.all(np.isfinite(gradient)) and not np.any(gradient[mask == 0])
        # Shifted scores are the same order.
        np.testing.assert_allclose(loss(scores + 3, relevance, mask)[0], loss(scores, relevance, mask)[0], rtol=1e-5)


@sweep("loss", [listwise_softmax, pairwise_logistic], quick=1)
def test_a_cross_encoder_learns_to_rank_by_it(loss):
    """Pairs of a query and a candidate in one sequence; relevant is the candidate that is the query's token."""
    config = ModelConfig(vocab_size=16, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=24)
    config = dataclasses.replace(config, causal=False, head=HeadConfig(outputs=1, pooling="first"))
    rng = np.random.default_rng(0)
    queries, right = rng.integers(0, 16, 24), rng.integers(0, 4, 24)
    candidates = (queries[:, None] + rng.integers(1, 16, (24, 4))) % 16
    candidates[np.arange(24), right] = queries
    pairs = np.stack([np.broadcast_to(queries[:, None], (24, 4)), candidates], axis=-1).reshape(-1, 2)
    relevance = np.eye(4)[right]
    model = Transformer(config)

    def scores(params):
        hidden, _ = model.apply({"params": params}, jnp.asarray(pairs))
        return logits(config, params, hidden).reshape(24, 4)

    @jax.jit
    def trained(params):
        optimizer = optax.adam(1e-2)

        def step(carry, _):
            gradient = jax.grad(lambda p: jnp.divide(*loss(scores(p), relevance)))(carry[0])
            updates, state = optimizer.update(gradient, carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        params, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=60)[0]
        return scores(params)

    start = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))
    assert np.mean(np.argmax(trained(start), axis=-1) == right) > 0.9


# ---- The metrics ----


@sweep("excluded", [True, False], quick=2)
def test_ranks_are_those_of_a_count(excluded):
    rng = np.random.default_rng(0)
    # Few values, so that there are ties.
    scores = rng.integers(0, 9, (3, ITEMS)).astype(np.float32)
    targets = np.array([5, HISTORIES[1, 2], 39])
    want = []
    for row, target in enumerate(targets):
        seen = set(HISTORIES[row, : LENGTHS[row]]) if excluded else set()
        ranked = [item for item in range(1, ITEMS) if item == target or item not in seen]
        want.append(sum(scores[row, item] >= scores[row, target] for item in ranked))
    history = (HISTORIES, VALID) if excluded else (None, None)
    found = jax.jit(functools.partial(ranks_of, first=1))(scores, targets, *history)
    np.testing.assert_array_equal(found, want)


def test_a_model_without_an_opinion_or_with_none_but_nan_finds_nothing():
    for scores in (jnp.zeros((2, 7)), jnp.full((2, 7), jnp.nan)):
        np.testing.assert_array_equal(ranks_of(scores, jnp.asarray([0, 6])), [7, 7])


def test_scores_are_those_of_a_count():
    ranks = np.array([1, 2, 3, 4, 11, 100])
    found = ranking_score(ranks, k=3)
    assert found.hit_rate == 3 / 6 and found.k == 3 and found.ranked_items == 6
    np.testing.assert_allclose(found.ndcg, (1 + 1 / np.log2(3) + 1 / 2) / 6)
    np.testing.assert_allclose(found.mrr, sum(1 / r for r in ranks) / 6)
    assert ranking_score([1, 1]) == RankingScore(1.0, 1.0, 1.0, 10, 2)
    for wrong in (([], 10), ([1], 0)):
        with pytest.raises(ValueError, match="rank at least one item"):
            ranking_score(*wrong)


def test_batches_are_ranked_on_a_mesh_as_one_by_one():
    targets, mask = np.array([[3], [5], [9]]), np.ones((3, 1), np.float32)
    rows = {"inputs": HISTORIES, "valid": VALID, "targets": targets, "mask": mask}
    # One row fills the batch up, and is not counted.
    batch = {name: np.concatenate([a, a[:1]]).astype(a.dtype) for name, a in rows.items()}
    batch["mask"] = batch["mask"] * np.array([[1], [1], [1], [0]], np.float32)
    found = []
    for sizes, batches in (
        ({"fsdp": 2, "tensor": 2}, [batch]),
        ({}, [{k: a[i : i + 1] for k, a in rows.items()} for i in range(3)]),
    ):
        mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[: 4 if sizes else 1])
        params = jax.device_put(made(), sharding.shardings(made(), axes_of(Transformer(SASREC), made()), mesh))
        found.append(Ranker(Transformer(SASREC), batches, mesh, exclude_history=True)(params))
    assert found[0] == found[1] and found[0].ranked_items == 3
    encoder = dataclasses.replace(SASREC, causal=False)
    with pytest.raises(ValueError, match="set model.causal"):
        Ranker(Transformer(encoder), [], mesh)

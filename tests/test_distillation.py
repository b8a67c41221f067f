"""Distillation: its losses by their definitions, its teacher online and stored, its cost, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import sweep

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.cost.hlo import compiled_cost
from jaxcost.data import DataConfig
from jaxcost.evaluation import distillation as loss
from jaxcost.evaluation.losses import cross_entropy
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.attention import Scores, log_probabilities, self_attention
from jaxcost.models.block import attention_scores
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.heads import Output
from jaxcost.models.transformer import HEADS, WATCHED, Transformer, initialize
from jaxcost.session import Session, load_run
from jaxcost.sharding import MeshConfig
from jaxcost.study.recipes import Recipe, StudyConfig, is_control
from jaxcost.study.run import run_study
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxcost.training.distill import PROJECTION, DistillConfig, Distiller, StoredLogits, Teacher, student_params
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import chain, factorize, freeze, lora, quantize

BIG = ModelConfig(
    vocab_size=0, width=32, num_layers=4, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64, max_length=32
)
SMALL = dataclasses.replace(BIG, num_layers=2, width=16, mlp_width=32)
VOCABULARY = 64


def initial(model, seed=0):
    return jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(seed))


def logits(seed, shape=(2, 3, VOCABULARY)):
    return 3 * jax.random.normal(jax.random.key(seed), shape)


# ---- Losses ----


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_are_what_their_definitions_say(temperature):
    teacher, student = logits(0), logits(1)
    p, q = (np.asarray(jax.nn.softmax(x / temperature), np.float64) for x in (teacher, student))
    forward = temperature**2 * np.sum(p * np.log(p / q), axis=-1)
    reverse = temperature**2 * np.sum(q * np.log(q / p), axis=-1)
    np.testing.assert_allclose(loss.kl_divergence(teacher, student, temperature), forward, rtol=1e-4)
    np.testing.assert_allclose(loss.kl_divergence(teacher, student, temperature, "reverse"), reverse, rtol=1e-4)
    np.testing.assert_allclose(loss.kl_divergence(teacher, teacher + 1, temperature), 0, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_what_is_stored_bounds_the_divergence_from_below_and_is_exact_when_all_is(direction):
    teacher, student = logits(0), logits(1)
    full = loss.kl_divergence(teacher, student, 2.0, direction)
    before = np.zeros_like(full)
    for k in (1, 4, 16, VOCABULARY):
        stored = loss.top_k_log_probs(teacher, k, 2.0)
        np.testing.assert_allclose(jnp.sum(jnp.exp(stored[0]), axis=-1), 1, rtol=1e-5)
        found = loss.stored_divergence(*stored, student, 2.0, direction)
        # Each k splits the one before it further, and splitting can only tell more.
        assert np.all(found >= before - 1e-5) and np.all(found <= full + 1e-5)
        before = found
    np.testing.assert_allclose(before, full, rtol=1e-4)


def test_a_student_that_knows_its_teacher_has_no_gradient_from_what_is_stored():
    teacher = logits(0)
    stored = loss.top_k_log_probs(teacher, 4, 2.0)
    gradient = jax.grad(lambda s: jnp.sum(loss.stored_divergence(*stored, s, 2.0)))(teacher)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    # Handing the missing mass to the k tokens would teach it to be surer than its teacher.
    kept = jax.nn.log_softmax(jnp.where(teacher >= jnp.sort(teacher)[..., -4:-3], teacher / 2, -1e9))
    wrong = jax.grad(lambda s: -jnp.sum(jnp.exp(kept) * jax.nn.log_softmax(s / 2)))(teacher)
    assert np.max(np.abs(wrong)) > 0.01


def pair(dtype=jnp.float32):
    hidden = jax.random.normal(jax.random.key(0), (2, 8, 16), dtype)
    theirs = jax.random.normal(jax.random.key(1), (2, 8, 24), dtype)
    heads = [jax.random.normal(jax.random.key(2 + i), (d, VOCABULARY), dtype) for i, d in enumerate((16, 24))]
    targets = jax.random.randint(jax.random.key(4), (2, 8), 0, VOCABULARY)
    mask = jnp.ones((2, 8)).at[1, 5:].set(0)
    return hidden, Output(heads[0]), loss.HiddenTeacher(theirs, Output(heads[1])), targets, mask


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("stored", [False, True])
def test_the_objective_is_the_sum_of_its_parts_whatever_the_chunks(chunks, stored):
    hidden, head, teacher, targets, mask = pair()
    theirs = teacher.hidden_BTE @ teacher.output.matrix
    said = loss.StoredTeacher(*loss.top_k_log_probs(theirs, 4, 2.0)) if stored else teacher
    both = loss.distillation_loss(hidden, head, said, targets, mask, temperature=2.0, chunks=chunks)
    np.testing.assert_allclose(both[0], cross_entropy(hidden, head, targets, mask)[0], rtol=1e-5)
    student = hidden @ head.matrix
    each = (
        loss.stored_divergence(said.log_probs_BTk, said.indices_BTk, student, 2.0)
        if stored
        else loss.kl_divergence(theirs, student, 2.0)
    )
    np.testing.assert_allclose(both[1], jnp.sum(each * mask), rtol=1e-5)


def test_no_gradient_reaches_the_teacher():
    hidden, head, teacher, targets, mask = pair()

    def total(teacher):
        return sum(loss.distillation_loss(hidden, head, teacher, targets, mask, temperature=2.0, chunks=2))

    assert all(not np.any(g) for g in jax.tree.leaves(jax.grad(total)(teacher)))
    states = jax.grad(lambda t: loss.hidden_loss(hidden, t, jnp.ones((16, 24)), mask))(teacher.hidden_BTE)
    assert not np.any(states)


def test_chunks_keep_both_logits_from_existing_whole():
    length, vocabulary = 64, 4096
    hidden, theirs = jnp.ones((2, length, 8)), jnp.ones((2, length, 8))
    head = jnp.ones((8, vocabulary))
    targets, mask = jnp.zeros((2, length), jnp.int32), jnp.ones((2, length))

    def bytes_of(chunks):
        def total(hidden, head):
            teacher = loss.HiddenTeacher(theirs, Output(jnp.ones((8, vocabulary))))
            return sum(
                loss.distillation_loss(hidden, Output(head), teacher, targets, mask, temperature=2.0, chunks=chunks)
            )

        compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, head).compile()
        return compiled_cost(compiled).temp_bytes, compiled.as_text()

    one = 2 * length * vocabulary * 4
    assert bytes_of(1)[0] > 1.5 * one
    cut, text = bytes_of(16)
    assert cut < 0.75 * one and f"f32[2,{length},{vocabulary}]" not in text


def test_hidden_states_are_compared_at_the_teachers_width():
    hidden, _, teacher, _, mask = pair()
    projection = jax.random.normal(jax.random.key(9), (16, 24))
    found = loss.hidden_loss(hidden, teacher.hidden_BTE, projection, mask)
    expected = np.sum(np.mean((hidden @ projection - teacher.hidden_BTE) ** 2, axis=-1) * mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert loss.hidden_loss(hidden, hidden, None, mask) == 0


def relation(seed, heads=4, kv_heads=2, size=8, length=6, **scores):
    keys = jax.random.split(jax.random.key(seed))
    shapes = [(2, length, n, size) for n in (heads, kv_heads)]
    return loss.Relation(*(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)), Scores(**scores))


def probabilities(found):
    """Of a relation, by the definition: float64 (B, N, T, T)."""
    left, right = (np.asarray(x, np.float64) for x in (found.left_BTNh, found.right_BTMh))
    right = np.repeat(right, left.shape[2] // right.shape[2], axis=2)
    products = np.einsum("btnh,bsnh->bnts", left, right) * left.shape[-1] ** -0.5
    if found.scores.soft_cap:
        products = found.scores.soft_cap * np.tanh(products / found.scores.soft_cap)
    distance = np.subtract.outer(np.arange(left.shape[1]), np.arange(left.shape[1]))
    seen = (distance >= 0) & (distance < (found.scores.window or left.shape[1]))
    exponents = np.where(seen, np.exp(products), 0)
    return exponents / exponents.sum(axis=-1, keepdims=True)


@sweep("scores", [{"window": 3, "soft_cap": 2.0}, {}, {"window": 3}, {"soft_cap": 2.0}], quick=1)
def test_relations_diverge_as_their_definition_says_whatever_the_chunks_and_sizes_of_heads(scores):
    student, teacher = relation(0, size=4, kv_heads=4, **scores), relation(1, **scores)
    mask = jnp.ones((2, 6)).at[1, 4:].set(0)

    def both(student, teacher):
        return loss.relation_loss(student, teacher, mask), loss.relation_loss(student, teacher, mask, chunks=3)

    p, q = probabilities(teacher), probabilities(student)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(p > 0, p * np.log(p / q), 0).sum(axis=-1).mean(axis=1)

    def values_and_gradients(student, teacher):
        found, back = jax.vjp(both, student, teacher)
        return found, back((1.0, 0.0)), back((0.0, 1.0))

    found, one, cut = jax.jit(values_and_gradients)(student, teacher)
    np.testing.assert_allclose(found, [np.sum(each * mask)] * 2, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, cut)
    assert all(map(np.any, jax.tree.leaves(one[0]))) and not any(map(np.any, jax.tree.leaves(one[1])))


def test_relations_that_cannot_be_compared_are_refused_in_one_line():
    for other, message in ((relation(1, heads=2), "last layer has 2 where the student's has 4"),
                           (relation(1, window=3), "see all and 3 of them")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            loss.relation_loss(relation(0), other, jnp.ones((2, 6)))


# ---- The step ----


def watched(model, params, tokens):
    out, sown = model.apply({"params": params}, tokens, mutable=[WATCHED])
    return out, sown[WATCHED][HEADS]


@pytest.mark.slow
@sweep(("top_layers", "remat"), [(2, "none"), (None, "none"), (1, "full")], quick=1)
def test_what_is_seen_is_the_last_layers_and_nothing_else_changes(top_layers, remat):
    config = dataclasses.replace(
        BIG,
        vocab_size=VOCABULARY,
        num_heads=4,
        head_dim=8,
        num_layers=3,
        window=3,
        pattern=("local", "global", "local"),
    )
    model = Transformer(config, ExecutionConfig(unroll="never", remat=remat))
    params = initial(model)
    params = freeze(top_layers=top_layers)(params) if top_layers else params
    tokens = jax.random.randint(jax.random.key(5), (2, 16), 0, VOCABULARY)
    (hidden, _), seen = watched(model, params, tokens)
    np.testing.assert_array_equal(hidden, model.apply({"params": params}, tokens)[0])
    assert {name: a.shape for name, a in seen.items()} == {
        "query": (2, 16, 4, 8),
        "key": (2, 16, 2, 8),
        "value": (2, 16, 2, 8),
    }
    # With the last layer's output matrix, the probabilities that are seen make what the layer adds.
    scores = attention_scores(config, config.layer_kinds[-1])
    weights_BNTT = jnp.exp(log_probabilities(seen["query"], seen["key"], jnp.arange(16)[None], scores))
    np.testing.assert_allclose(jnp.sum(weights_BNTT, axis=-1), 1, rtol=1e-5)
    averaged = jnp.einsum("bnts,bsnh->btnh", weights_BNTT, jnp.repeat(seen["value"], 2, axis=2))
    expected = self_attention(seen["query"], seen["key"], seen["value"], "reference", scores)
    np.testing.assert_allclose(averaged, expected, atol=1e-5)
    # It is the last layer: twice its values are twice what is seen of them, and nothing else.
    layers = params["layers"]
    doubled = layers["attention"]["value"]["kernel"].at[-1].multiply(2)
    changed = layers | {"attention": layers["attention"] | {"value": {"kernel": doubled}}}
    _, twice = watched(model, params | {"layers": changed}, tokens)
    jax.tree.map(np.testing.assert_array_equal, twice, seen | {"value": 2 * seen["value"]})


def step_of(config, accumulation=1, chunks=1):
    """The jitted step of a small student, its state, a batch and its teacher."""
    execution = ExecutionConfig(unroll="never")
    student, teacher = (Transformer(dataclasses.replace(c, vocab_size=VOCABULARY), execution) for c in (SMALL, BIG))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)
    distiller = Distiller(config, teacher if config.online else None)
    step = make_train_step(
        student, optimizer, chain(), accumulation=accumulation, loss_chunks=chunks, distiller=distiller
    )
    params, taught = (initial(m, i) for i, m in enumerate((student, teacher)))
    state = init_state(params, optimizer, 0, distiller.beside(student.config.width, 0))
    tokens = jax.random.randint(jax.random.key(5), (4, 16), 0, VOCABULARY)
    batch = {"inputs": tokens, "targets": jnp.roll(tokens, -1, 1), "mask": jnp.ones((4, 16))}
    return jax.jit(step), state, batch, Teacher(teacher, taught)


@pytest.mark.slow
def test_the_teacher_has_no_moments_and_its_work_is_in_the_compiled_cost():
    step, state, batch, teacher = step_of(DistillConfig(logits=1.0))
    places = [path[-1] for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer)]
    assert {place.key for place in places if hasattr(place, "key")} == set(weights.partition(state.params)[0])
    optimizer = make_optimizer(OptimizerConfig(), 10)
    plain = make_train_step(
        Transformer(dataclasses.replace(SMALL, vocab_size=VOCABULARY), ExecutionConfig(unroll="never")),
        optimizer,
        chain(),
    )
    both = compiled_cost(step.lower(state, batch, teacher.params).compile())
    alone = compiled_cost(jax.jit(plain).lower(init_state(state.params, optimizer, 0), batch).compile())
    forward = compiled_cost(jax.jit(teacher.logits).lower(batch).compile()).total_flops
    assert both.total_flops - alone.total_flops == pytest.approx(forward, rel=0.02)
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(teacher.params))
    assert both.argument_bytes - alone.argument_bytes == pytest.approx(held, rel=0.01)


@pytest.mark.long
def test_accumulation_gives_the_objective_of_the_whole_batch():
    config = DistillConfig(logits=0.7, hidden=0.3, attention=0.2, values=0.1, labels=0.5, direction="reverse")
    found = []
    for accumulation, chunks in ((1, 1), (2, 4)):
        step, state, batch, teacher = step_of(config, accumulation=accumulation, chunks=chunks)
        found.append(step(state, batch, teacher.params))
    np.testing.assert_allclose(found[0][1]["gradient_norm"], found[1][1]["gradient_norm"], rtol=1e-4)
    np.testing.assert_allclose(found[0][1]["loss"], found[1][1]["loss"], rtol=1e-5)


def test_a_learned_projection_trains_beside_the_weights_and_a_fixed_one_does_not_exist():
    step, state, batch, teacher = step_of(DistillConfig(hidden=1.0))
    assert state.beside[PROJECTION].shape == (16, 32)
    after, _ = step(state, batch, teacher.params)
    assert np.any(after.beside[PROJECTION] != state.beside[PROJECTION])
    assert jax.tree.structure(after.params) == jax.tree.structure(state.params)
    step, state, batch, teacher = step_of(DistillConfig(hidden=1.0, projection="fixed"))
    assert state.beside == {} and step(state, batch, teacher.params)[0].beside == {}


@pytest.mark.slow
def test_a_student_learns_to_attend_as_its_teacher_does():
    step, state, batch, teacher = step_of(DistillConfig(attention=1.0, values=1.0, labels=0.0))
    student = Transformer(dataclasses.replace(SMALL, vocab_size=VOCABULARY), ExecutionConfig(unroll="never"))

    def distances(params):
        both = [watched(m, p, batch["inputs"])[1] for m, p in ((student, params), (teacher.model, teacher.params))]
        pairs = [[loss.Relation(seen[a], seen[b]) for seen in both] for a, b in (("query", "key"), ("value", "value"))]
        return [float(loss.relation_loss(*pair, batch["mask"])) for pair in pairs]

    before = distances(state.params)
    for _ in range(10):
        state, _ = step(state, batch, teacher.params)
    assert all(new < 0.8 * old for new, old in zip(distances(state.params), before, strict=True))


@pytest.mark.slow
def test_all_of_the_vocabulary_stored_trains_like_the_teacher_itself():
    step, state, batch, teacher = step_of(DistillConfig(logits=1.0))
    online, _ = step(state, batch, teacher.params)
    offline, state, batch, _ = step_of(DistillConfig(logits=1.0, top_k=VOCABULARY))
    log_probs, indices = loss.top_k_log_probs(teacher.logits(batch), VOCABULARY, 2.0)
    stored, _ = offline(state, batch | {"teacher_log_probs": log_probs, "teacher_indices": indices})
    for one, other in zip(jax.tree.leaves(online.params), jax.tree.leaves(stored.params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


# ---- Students made of their teachers ----


@pytest.mark.slow
def test_every_second_layer_of_the_teacher_of_any_kind_of_weight():
    model = Transformer(dataclasses.replace(BIG, vocab_size=VOCABULARY))
    teacher = chain(quantize(), lora(rank=2))(initial(model))
    student = student_params(teacher, 2)
    jax.tree.map(lambda s, t: np.testing.assert_array_equal(s, t[::2]), student["layers"], teacher["layers"])
    assert student["embed"] is teacher["embed"]
    odd = student_params(teacher, 3)["layers"]["mlp_norm"]["scale"].weight
    np.testing.assert_array_equal(odd, teacher["layers"]["mlp_norm"]["scale"].weight[jnp.array([0, 1, 2])])
    with pytest.raises(ValueError, match="has 4 layers; a student of 5"):
        student_params(teacher, 5)
    with pytest.raises(ValueError, match="partly frozen"):
        student_params(teacher | {"frozen_layers": {}}, 2)


# ---- Whole runs ----


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory, data_dir):
    """The folder of a trained teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    session_of(experiment(data_dir, model=BIG, training=TrainingConfig(steps=30))).train(folder)
    return folder


def experiment(data_dir, **changes):
    settings = {
        "model": SMALL,
        "data": DataConfig(name="python_text/reference", sequence_length=32, batch_size=8, data_dir=data_dir),
        "mesh": MeshConfig(data=-1),
        "execution": ExecutionConfig(unroll="never"),
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "training": TrainingConfig(steps=8),
        "checkpoint": CheckpointConfig(every_steps=4),
        "evaluation": EvaluationConfig(max_tokens=1024),
    }
    return Experiment(**settings | changes)


def session_of(value, devices=1):
    return Session(value, quiet=True, devices=jax.devices()[:devices])


@pytest.mark.long
def test_a_student_on_a_mesh_learns_what_one_device_would_teach_it(tmp_path, data_dir, taught):
    value = experiment(data_dir, distill=DistillConfig(teacher=str(taught), logits=1.0, hidden=0.5))
    one = session_of(value).train(tmp_path / "one")
    spread = dataclasses.replace(value, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    many = session_of(spread, 8).train(tmp_path / "many")
    np.testing.assert_allclose(one.losses, many.losses, rtol=1e-4)
    plain = session_of(experiment(data_dir)).train(tmp_path / "plain")
    assert one.cost.total_flops > plain.cost.total_flops and one.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)


@pytest.mark.slow
def test_a_distilled_run_goes_on_where_it_stopped_and_is_loaded_again(tmp_path, data_dir, taught):
    config = DistillConfig(teacher=str(taught), logits=0.5, hidden=0.5)
    whole = session_of(experiment(data_dir, distill=config)).train(tmp_path / "whole")
    session = session_of(experiment(data_dir, distill=config, evaluation=EvaluationConfig(max_tokens=1024)))

    def stop(params):
        raise KeyboardInterrupt

    session.evaluate = stop
    with pytest.raises(KeyboardInterrupt):
        session.train(tmp_path / "broken")
    again = session_of(experiment(data_dir, distill=config)).train(tmp_path / "broken")
    assert again.losses == whole.losses[4:] and again.metrics == whole.metrics
    opened, params, step = load_run(tmp_path / "broken", jax.devices()[:1])
    assert step == 8 and opened.evaluate(params)["bits_per_byte"] == whole.metrics["bits_per_byte"]


@pytest.mark.slow
def test_what_a_teacher_said_is_stored_once_and_read_by_step(tmp_path, data_dir, taught, monkeypatch):
    config = DistillConfig(teacher=str(taught), logits=1.0, top_k=8, store=str(tmp_path / "store"))
    first = session_of(experiment(data_dir, distill=config)).train(tmp_path / "first")
    assert len(list((tmp_path / "store").glob("*.npz"))) == 8
    monkeypatch.setattr(Session, "teacher", lambda self: pytest.fail("the teacher was loaded again"))
    moved = dataclasses.replace(config, store=str(tmp_path / "moved"))
    (tmp_path / "store").rename(tmp_path / "moved")
    again = session_of(experiment(data_dir, distill=moved)).train(tmp_path / "again")
    assert again.losses == first.losses
    # Offline, no teacher is in the step.
    online = session_of(experiment(data_dir)).train(tmp_path / "plain")
    assert first.cost.total_flops == online.cost.total_flops


@pytest.mark.long
def test_a_student_may_start_as_layers_of_its_teacher(tmp_path, data_dir, taught):
    student = dataclasses.replace(BIG, num_layers=2)
    config = DistillConfig(teacher=str(taught), logits=1.0, from_layers=True)
    copied = session_of(experiment(data_dir, model=student, distill=config)).train(tmp_path / "copied")
    fresh = dataclasses.replace(config, from_layers=False)
    anew = session_of(experiment(data_dir, model=student, distill=fresh)).train(tmp_path / "anew")
    assert copied.losses[0] < anew.losses[0] - 0.3


@pytest.mark.long
def test_a_recipe_is_taught_by_the_base_of_its_study(tmp_path, data_dir):
    recipes = (Recipe("thin", transforms=(factorize(),), finish=(quantize(),), distill=DistillConfig(logits=1.0)),)
    study = StudyConfig(recipes=recipes, recovery_steps=4, topology="v99:1x1", decode_tokens=4)
    value = experiment(data_dir, study=study)
    result = run_study(value, tmp_path, quiet=True, devices=jax.devices()[:1])
    control, thin = result["rows"]
    assert control["distill"] is None and thin["distill"]["logits"] == 1.0 and not thin["control"]
    assert thin["description"] == "low rank, 50% of the parameters → taught by the base → int8 weights"
    # The whole teacher's forward pass, which the thin student's own saving does not make up for.
    assert thin["step_flops"] > control["step_flops"]
    finding = next(each for each in result["findings"] if each["claim"] == "thin_gains_from_its_teacher")
    assert finding["holds"] == (thin["score"] < control["score"])


# ---- What is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "distill.temperature is 0.0; it must be positive"),
        ({"temperature": -1.0}, "distill.temperature is -1.0"),
        ({"temperature": float("nan")}, "distill.temperature is nan"),
        ({"logits": -1.0}, "distill.logits is -1.0; it cannot be negative"),
        ({"top_k": -1}, "distill.top_k is -1"),
        ({"values": -1.0}, "distill.values is -1.0; it cannot be negative"),
        ({"top_k": 4}, "distill.top_k stores logits alone"),
        ({"top_k": 4, "logits": 1.0, "attention": 1.0}, "logits above 0 and distill.attention to 0"),
        ({"top_k": 4, "logits": 1.0, "hidden": 1.0}, "distill.top_k stores logits alone"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        DistillConfig(**settings)
    assert "\n" not in str(caught.value)


def test_teachers_that_cannot_teach_are_refused_before_the_folder_is_claimed(tmp_path, data_dir, taught):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            session_of(experiment(data_dir, **changes)).train(tmp_path / "run")
        assert not (tmp_path / "run" / "experiment.json").exists()

    config = DistillConfig(teacher=str(taught), logits=1.0)
    larger = dataclasses.replace(SMALL, vocab_size=1024)
    refused("vocabulary has 384 tokens and the student's 1024", model=larger, distill=config)
    refused("give the folder of a training", distill=dataclasses.replace(config, teacher=""))
    refused("holds no run", distill=dataclasses.replace(config, teacher=str(tmp_path / "nowhere")))
    refused("takes blocks of the teacher", distill=dataclasses.replace(config, from_layers=True))
    other = dataclasses.replace(experiment(data_dir).data, tokenizer="bpe", bpe_vocab_size=300)
    refused("another tokeniser", data=other, distill=config)


def test_a_store_of_another_run_is_refused(tmp_path, data_dir, taught):
    config = DistillConfig(teacher=str(taught), logits=1.0, top_k=4, store=str(tmp_path / "store"))
    value = experiment(data_dir, distill=config)
    session_of(value).train(tmp_path / "first")

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            session_of(dataclasses.replace(value, **changes)).train(tmp_path / "second")

    refused("run with another top_k;", distill=dataclasses.replace(config, top_k=8))
    refused("run with another temperature;", distill=dataclasses.replace(config, temperature=1.0))
    refused("run with another data;", data=dataclasses.replace(value.data, shuffle_seed=1))
    # The description may lie; the batches' own checksums do not.
    description = json.loads((tmp_path / "store" / "store.json").read_text())
    description["data"]["shuffle_seed"] = 1
    (tmp_path / "store" / "store.json").write_text(json.dumps(description))
    refused("00000001.npz was stored for another batch", data=dataclasses.replace(value.data, shuffle_seed=1))
    with pytest.raises(ValueError, match="no teacher's logits for step 9"):
        StoredLogits(tmp_path / "store", {}, 9).read(9, {})


def test_recipes_are_taught_by_the_base_alone():
    assert not is_control(Recipe("taught", distill=DistillConfig(logits=1.0)))
    for config in (DistillConfig(), DistillConfig(logits=1.0, teacher="runs/x")):
        with pytest.raises(ValueError, match="is taught by the base model"):
            Recipe("taught", distill=config)


@pytest.mark.slow
def test_a_step_with_a_teacher_is_planned_with_it(data_dir, taught):
    from jaxcost import sharding
    from jaxcost.planning.steps import trace_step

    def traced(config, **changes):
        value = experiment(data_dir, distill=config, **changes | {"mesh": MeshConfig(fsdp=2)})
        return trace_step("train", value, 384, sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))

    def compiled(found):
        return compiled_cost(found.jitted.lower(*found.arguments).compile())

    config = DistillConfig(teacher=str(taught), logits=1.0, hidden=1.0, attention=1.0)
    alone, both = traced(DistillConfig()), traced(config)
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(load_run(taught)[1]))
    assert both.bytes_by_category["teacher"] == pytest.approx(held / 2, rel=0.05)
    costs = [compiled(found) for found in (alone, both)]
    beside = 3 * 4 * SMALL.width * BIG.width
    assert costs[1].argument_bytes - costs[0].argument_bytes == pytest.approx(held / 2 + beside, rel=0.05)
    assert costs[1].total_flops > 2 * costs[0].total_flops
    stored = traced(DistillConfig(logits=1.0, top_k=4))
    assert stored.bytes_by_category["teacher"] == 0
    assert stored.bytes_by_category["batch"] - alone.bytes_by_category["batch"] == 8 * 32 * (5 + 4) * 4 // 2
    stored.jitted.lower(*stored.arguments)
    with pytest.raises(ValueError, match="give the folder of a training as distill.teacher"):
        traced(DistillConfig(logits=1.0))
    with pytest.raises(ValueError, match="last layer has 2 where the student's has 1"):
        unlike = traced(config, model=dataclasses.replace(SMALL, num_heads=1, num_kv_heads=1))
        unlike.jitted.lower(*unlike.arguments)

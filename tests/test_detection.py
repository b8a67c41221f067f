"""Objects in images: a detector against transformers, its loss, and average precision on cases made by hand."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from sweep import sweep

from jaxcost import sharding
from jaxcost.cost import closed_form, trace
from jaxcost.cost.hlo import compiled_cost
from jaxcost.cost.transformed import training_step_flops
from jaxcost.evaluation.detection import (
    DETR,
    Objects,
    SetWeights,
    average_precision,
    detection_loss,
    found_objects,
    generalized_iou,
    match,
    set_losses,
)
from jaxcost.models import huggingface
from jaxcost.models.config import HeadConfig, ImageConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.huggingface import fields
from jaxcost.models.transformer import Transformer, abstract, axes_of, detections, initialize, logits
from jaxcost.training.config import OptimizerConfig
from jaxcost.training.distill import DistillConfig, Distiller
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import chain, factorize, freeze, lora, shrink

oracles = pytest.mark.oracles

LABELS, PLACES = 3, 5
CONFIG = ModelConfig(
    vocab_size=0, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=24, max_length=12
)
CONFIG = dataclasses.replace(
    CONFIG,
    causal=False,
    position="learned",
    layer_positions=True,
    norm="layer",
    gated=False,
    images=ImageConfig(patch=4, height=8, width=12, channels=2, class_tokens=1, detection_tokens=PLACES),
    head=HeadConfig(outputs=LABELS + 1, hidden="relu", hidden_layers=2, bias=True, boxes=True),
)
MODEL = Transformer(CONFIG, ExecutionConfig(unroll="never"))


@functools.cache
def made():
    return jax.jit(lambda key: initialize(MODEL, key)[0])(jax.random.key(0))


def images_of(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, 8, 12, 2)).astype(np.float32)


def objects_of(rows, most=4, seed=1):
    """Labels, boxes and a mask of up to `most` objects; the first image has none."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, LABELS, (rows, most)).astype(np.int32)
    boxes = np.concatenate([rng.uniform(0.2, 0.8, (rows, most, 2)), rng.uniform(0.1, 0.6, (rows, most, 2))], axis=-1)
    counts = np.concatenate([[0, most], rng.integers(0, most + 1, max(0, rows - 2))])[:rows]
    mask = (np.arange(most) < counts[:, None]).astype(np.float32)
    # Padding as it comes: no box at all.
    return labels * mask.astype(np.int32), (boxes * mask[..., None]).astype(np.float32), mask


def answers_of(rows, seed=2):
    rng = np.random.default_rng(seed)
    centres, sides = rng.uniform(0.2, 0.8, (rows, PLACES, 2)), rng.uniform(0.1, 0.6, (rows, PLACES, 2))
    boxes = np.concatenate([centres, sides], axis=-1).astype(np.float32)
    return 2 * rng.normal(size=(rows, PLACES, LABELS + 1)).astype(np.float32), boxes


# ---- Against transformers ----

SIZES = {"image_size": (16, 24), "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
SIZES |= {"intermediate_size": 80, "num_labels": LABELS, "initializer_range": 0.3, "num_detection_tokens": PLACES}
SIZES |= {"use_mid_position_embeddings": False}
CASES = {
    "square": {"image_size": (16, 16)},
    "positions behind layers": {"use_mid_position_embeddings": True},
    "odd": {"hidden_size": 42, "num_attention_heads": 3, "num_channels": 1, "qkv_bias": False, "hidden_act": "relu"},
    # As the smallest of the published ones: patches do not fill it.
    "sizes that patches do not fill": {"image_size": (20, 31)},
}


@functools.cache
def hugging_model(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(len(name))
    config = transformers.YolosConfig(**(SIZES | CASES[name]))
    model = transformers.YolosForObjectDetection._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path.lower() or path.endswith("bias") or "token" in path or "position" in path:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    return model


def theirs(model, images):
    import torch

    with torch.no_grad():
        made = model(torch.as_tensor(np.moveaxis(images, -1, 1)))
    return made.logits.numpy(), made.pred_boxes.numpy()


@oracles
@pytest.mark.parametrize("name", CASES)
def test_what_is_found_is_what_transformers_finds_and_ours_is_theirs(name, tmp_path):
    import torch

    model = hugging_model(name)
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    sizes = config.images
    images = np.random.default_rng(0).normal(size=(2, sizes.height, sizes.width, sizes.channels)).astype(np.float32)
    want = theirs(model, images)
    assert all(np.std(one) > 0.05 for one in want)
    got = detections(Transformer(config), params, jnp.asarray(images))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)

    huggingface.save(tmp_path / "out", config, params)
    again, problems = type(model).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert again.config.num_labels == LABELS and not any(problems.values()), problems
    for one, other in zip(theirs(again.eval(), images), want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    back, same = huggingface.load(tmp_path / "out")
    assert fields._effective(back) == fields._effective(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


@oracles
def test_the_loss_and_its_gradient_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    scores, boxes = answers_of(4)
    labels, objects, mask = objects_of(4)
    given = [torch.tensor(one, requires_grad=True) for one in (scores, boxes)]
    # It matches all images at once, and cannot without an object in one of them.
    wanted = [
        {"class_labels": torch.tensor(label[m > 0], dtype=torch.int64), "boxes": torch.tensor(box[m > 0])}
        for label, box, m in zip(labels, objects, mask, strict=True)
    ]
    loss, parts, _ = ForObjectDetectionLoss(given[0], wanted, "cpu", given[1], hugging_model("square").config)
    loss.backward()
    found = set_losses(scores, boxes, labels, objects, mask)
    np.testing.assert_allclose(found.labels, parts["loss_ce"].item(), rtol=1e-5)
    np.testing.assert_allclose(found.distance, parts["loss_bbox"].item(), rtol=1e-5)
    np.testing.assert_allclose(found.overlap, parts["loss_giou"].item(), rtol=1e-5)
    np.testing.assert_allclose(found.total(), loss.item(), rtol=1e-5)
    gradient = jax.grad(lambda *a: set_losses(*a, labels, objects, mask).total(), argnums=(0, 1))(scores, boxes)
    for got, want in zip(gradient, given, strict=True):
        np.testing.assert_allclose(got, want.grad.numpy(), atol=1e-5)


# ---- The model ----


def test_boxes_are_shares_and_stand_beside_the_logits_of_the_detection_tokens():
    scores, boxes = jax.jit(functools.partial(detections, MODEL))(made(), images_of(3))
    assert scores.shape == (3, PLACES, LABELS + 1) and boxes.shape == (3, PLACES, 4)
    assert scores.dtype == boxes.dtype == jnp.float32 and np.all((boxes > 0) & (boxes < 1))
    hidden, _ = MODEL.apply({"params": made()}, images_of(3))
    np.testing.assert_allclose(logits(CONFIG, made(), hidden), scores, atol=1e-5)
    with pytest.raises(ValueError, match="model.head.boxes is off"):
        detections(small.MODEL, small.dense_params(), images_of(1))


def test_parameters_and_flops_are_those_of_the_closed_form():
    params, axes = abstract(MODEL)
    assert sum(a.size for a in jax.tree.leaves(params)) == closed_form.parameter_counts(CONFIG).total
    assert axes_of(MODEL, params) == axes
    images = jax.ShapeDtypeStruct((3, 8, 12, 2), jnp.float32)
    found = trace.flops_of(functools.partial(detections, MODEL), params, images).flops
    tokens = CONFIG.images.tokens
    # What some tokens alone meet is shared out in whole FLOPs.
    assert abs(found / 3 - tokens * closed_form.forward_flops_per_token(CONFIG, tokens, "full")) <= tokens


def test_positions_behind_layers_are_added_there_and_layers_between_them_stay():
    plain = dataclasses.replace(CONFIG, layer_positions=False)
    cleared = made() | {"layer_positions": jax.tree.map(jnp.zeros_like, made()["layer_positions"])}
    without = {name: tree for name, tree in made().items() if name != "layer_positions"}
    images = images_of(2)
    found, same = (detections(MODEL, params, images)[0] for params in (made(), cleared))
    want, _ = detections(Transformer(plain), without, images)
    np.testing.assert_allclose(same, want, atol=1e-6)
    assert np.abs(found - want).max() > 1e-3
    with pytest.raises(ValueError, match="stand behind each of them cannot be told; keep all layers"):
        detections(MODEL, shrink(layers=1)(made()), images)
    with pytest.raises(ValueError, match="model.layer_positions is for learned positions"):
        dataclasses.replace(CONFIG, position="rope")


TRANSFORMS = {"plain": chain(), "lora": lora(rank=2), "low rank": factorize(), "top layer": freeze(top_layers=1)}


@sweep("name", TRANSFORMS, quick=0)
def test_a_step_costs_what_the_closed_form_says(name):
    optimizer = make_optimizer(OptimizerConfig(), 10)
    params = TRANSFORMS[name].abstract(abstract(MODEL)[0])
    state = jax.eval_shape(lambda params: init_state(params, optimizer, 0), params)
    labels, boxes, mask = objects_of(4)
    batch = {"inputs": images_of(4), "targets": labels, "boxes": boxes, "mask": mask}
    step = jax.jit(make_train_step(MODEL, optimizer, TRANSFORMS[name]))
    compiled = compiled_cost(step.lower(state, batch).compile()).flops
    closed = training_step_flops(CONFIG, params, 4, CONFIG.images.tokens, "full")
    assert closed == pytest.approx(compiled, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"images": dataclasses.replace(CONFIG.images, detection_tokens=0)},
            "needs model.images with detection_tokens",
        ),
        ({"images": ImageConfig(), "vocab_size": 8}, "needs model.images with detection_tokens"),
        ({"max_length": 11}, "makes 12 tokens, more than model.max_length"),
    ],
)
def test_boxes_without_tokens_for_them_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("change", [{"outputs": 1}, {"pooling": "first"}, {"hidden_norm": True}])
def test_heads_of_boxes_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match="model.head.boxes is on"):
        dataclasses.replace(CONFIG.head, **change)
    with pytest.raises(ValueError, match="hidden_layers is 0"):
        HeadConfig(hidden_layers=0)


# ---- The loss ----


def test_overlaps_of_boxes_that_are_known():
    left = jnp.asarray([[0.5, 0.5, 1.0, 1.0]])
    right = jnp.asarray([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0], [2.0, 0.5, 1.0, 1.0], [0.5, 0.5, 0.0, 0.0]])
    # The same; half of it; apart by a half, so that a fifth of the box around them is empty; a point inside.
    np.testing.assert_allclose(generalized_iou(left, right), [1, 0.5, -0.2, 0], atol=1e-6)
    both = jnp.zeros((1, 4))
    assert np.all(np.isfinite(jax.grad(lambda a: jnp.sum(generalized_iou(a, both)))(both)))


def by_trial(scores, boxes, labels, objects, mask, w=DETR):
    """The cheapest matching of one image by trying all."""
    kept = np.flatnonzero(mask)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)

    def cost(places):
        total = 0.0
        for place, i in zip(places, kept, strict=True):
            overlap = float(generalized_iou(boxes[place], objects[i]))
            total += w.distance * np.abs(boxes[place] - objects[i]).sum() - w.overlap * overlap
            total -= w.labels * shares[place, labels[i]]
        return total

    return min(itertools.permutations(range(len(boxes)), len(kept)), key=cost)


@sweep("most", [3, PLACES, 1], quick=1)
def test_the_matching_is_the_cheapest(most):
    scores, boxes = answers_of(5)
    labels, objects, mask = objects_of(5, most)
    found = np.asarray(jax.jit(match)(scores, boxes, labels, objects, mask))
    for places, *image in zip(found, scores, boxes, labels, objects, mask, strict=True):
        assert len(set(places)) == most
        assert tuple(places[image[-1] > 0]) == by_trial(*image)


@pytest.mark.slow
def test_every_device_matches_its_own_images_and_asks_no_other():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    given = dict(enumerate((*answers_of(8), *objects_of(8))))
    with jax.set_mesh(mesh):
        placed = sharding.place_batch(given, mesh).values()
        compiled = jax.jit(match).lower(*placed).compile()
        np.testing.assert_array_equal(compiled(*placed), match(*given.values()))
    assert not any(name in compiled.as_text() for name in ("all-reduce", "all-gather", "collective-permute"))


@pytest.mark.slow
def test_padding_changes_nothing():
    scores, boxes = answers_of(3)
    labels, objects, mask = objects_of(3, 2)
    padded = [np.pad(one, ((0, 0), (0, 2)) + ((0, 0),) * (one.ndim - 2)) for one in (labels, objects, mask)]
    one, other = (set_losses(scores, boxes, *wanted) for wanted in ((labels, objects, mask), padded))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), one, other)
    total, count = detection_loss(scores, boxes, labels, objects, mask)
    np.testing.assert_allclose(total, one.total() * mask.sum(), rtol=1e-6)
    assert count == mask.sum()


@pytest.mark.slow
def test_images_without_objects_are_learned_from():
    scores, boxes = answers_of(2)
    labels, objects, mask = (0 * one for one in objects_of(2))
    found = set_losses(scores, boxes, labels, objects, mask)
    want = -np.mean(jax.nn.log_softmax(scores)[..., -1])
    np.testing.assert_allclose(found.labels, want, rtol=1e-5)
    assert found.distance == found.overlap == 0 and found.objects == 1


def test_answers_that_are_no_numbers_end_in_a_loss_that_is_none():
    scores, boxes = answers_of(2)
    found = jax.jit(set_losses)(scores * np.nan, boxes * np.nan, *objects_of(2))
    assert np.isnan(found.total())


def test_more_objects_than_places_are_refused():
    with pytest.raises(ValueError, match="may have 6 objects and the model finds 5"):
        match(*answers_of(2), *objects_of(2, 6))


def test_weights_are_those_that_were_given():
    scores, boxes = answers_of(3)
    wanted = objects_of(3)
    weights = SetWeights(labels=2.0, distance=0.5, overlap=0.25, no_object=0.3)
    found = set_losses(scores, boxes, *wanted, weights)
    total, count = detection_loss(scores, boxes, *wanted, weights)
    np.testing.assert_allclose(total / count, 2 * found.labels + 0.5 * found.distance + 0.25 * found.overlap, rtol=1e-6)
    assert abs(found.labels - set_losses(scores, boxes, *wanted).labels) > 1e-3


# ---- Training ----


def steps(mesh, batches, **options):
    metrics, params = small.trained(MODEL, made(), batches, mesh, **options)
    return [one["loss"] for one in metrics], params


def batch_of(rows=8, seed=0):
    labels, boxes, mask = objects_of(rows, seed=seed)
    return {"inputs": images_of(rows, seed), "targets": labels, "boxes": boxes, "mask": mask}


ONE = sharding.MeshConfig()


@sweep("sizes", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2}], quick=0, slow=0)
def test_training_on_a_mesh_is_that_on_one_device(sizes):
    config = sharding.MeshConfig(**sizes)
    mesh = sharding.make_mesh(config, jax.devices()[: int(np.prod(list(sizes.values())))])
    batches = [batch_of()] * 3
    want, params = steps(sharding.make_mesh(ONE, jax.devices()[:1]), batches)
    got, same = steps(mesh, batches)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert want[-1] < want[0] - 1e-2
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, made()["head"], params["head"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.long
def test_microbatches_count_by_their_objects():
    mesh = sharding.make_mesh(ONE, jax.devices()[:1])
    batch = batch_of(4)
    found, _ = steps(mesh, [batch], accumulation=2)
    parts = [{name: one[i::2] for name, one in batch.items()} for i in range(2)]
    want = [steps(mesh, [part])[0][0] for part in parts]
    np.testing.assert_allclose(found[0], np.average(want, weights=[part["mask"].sum() for part in parts]), rtol=1e-5)


@pytest.mark.slow
def test_a_batch_without_objects_moves_the_weights():
    batch = batch_of(2)
    batch["mask"] = 0 * batch["mask"]
    (loss,), params = steps(sharding.make_mesh(ONE, jax.devices()[:1]), [batch])
    assert np.isfinite(loss) and np.all(np.isfinite(params["head"]["output"]["kernel"]))
    assert np.any(params["head"]["output"]["kernel"] != made()["head"]["output"]["kernel"])


def test_no_teacher_says_anything_of_boxes():
    with pytest.raises(ValueError, match="leave out the teacher"):
        make_train_step(MODEL, None, chain(), distiller=Distiller(DistillConfig(logits=1.0), MODEL))


# ---- Average precision ----

BOX = np.array([0.5, 0.5, 0.4, 0.4])


def shifted(overlap):
    """A box that overlaps BOX by this intersection over union."""
    move = 0.4 * (1 - 2 * overlap / (1 + overlap))
    return BOX + np.array([move, 0, 0, 0])


def objects(boxes, labels=None, scores=None):
    labels = np.zeros(len(boxes), int) if labels is None else np.asarray(labels)
    return Objects(np.reshape(boxes, (-1, 4)), labels, None if scores is None else np.asarray(scores, float))


FAR = np.array([0.1, 0.1, 0.1, 0.1])
THERE = [objects([BOX])]
APS = {
    "found": ([objects([BOX], scores=[0.9])], THERE, 1.0, 1.0),
    "nothing said": ([objects([], scores=[])], THERE, 0.0, 0.0),
    "elsewhere": ([objects([FAR], scores=[0.9])], THERE, 0.0, 0.0),
    "another label": ([objects([BOX], [1], [0.9])], THERE, 0.0, 0.0),
    # Up to 0.7 of the thresholds 0.5, 0.55, ..., 0.95: five of ten.
    "roughly": ([objects([shifted(0.72)], scores=[0.9])], THERE, 0.5, 1.0),
    # A wrong one that is surer halves the precision at every recall.
    "after a mistake": ([objects([BOX, FAR], scores=[0.5, 0.9])], THERE, 0.5, 0.5),
    "before a mistake": ([objects([BOX, FAR], scores=[0.9, 0.5])], THERE, 1.0, 1.0),
    # The second finding of one object is a mistake.
    "twice": ([objects([BOX, BOX], scores=[0.9, 0.8])], [objects([BOX, FAR])], 51 / 101, 51 / 101),
    # Half is found, so that recalls up to 0.5 count: 51 of 101.
    "half of them": ([objects([BOX], scores=[0.9])], [objects([BOX, FAR])], 51 / 101, 51 / 101),
    "two images": (
        [objects([BOX, FAR], scores=[0.9, 0.8]), objects([BOX], scores=[0.7])],
        [objects([BOX]), objects([BOX])],
        (51 + 50 * 2 / 3) / 101,
        (51 + 50 * 2 / 3) / 101,
    ),
    "two labels": ([objects([BOX, FAR], [0, 1], [0.9, 0.9])], [objects([BOX, BOX], [0, 1])], 0.5, 0.5),
    "an image without objects": (
        [objects([BOX], scores=[0.9]), objects([FAR], scores=[0.95])],
        [*THERE, objects([])],
        0.5,
        0.5,
    ),
}


@pytest.mark.parametrize("name", APS)
def test_average_precision_is_that_of_cases_by_hand(name):
    found, there, ap, ap_50 = APS[name]
    score = average_precision(found, there)
    np.testing.assert_allclose([score.ap, score.ap_50], [ap, ap_50], atol=1e-9)


def test_the_surest_alone_count():
    found = [objects([FAR, BOX], scores=[0.9, 0.5])]
    assert average_precision(found, THERE, most=1).ap == 0 and average_precision(found, THERE, most=2).ap == 0.5


def test_what_cannot_be_scored_is_refused():
    for found, there, said in (
        ([], THERE, "give both of the same images"),
        ([objects([], scores=[])], [objects([])], "with at least one object"),
        (THERE, THERE, "has no scores"),
    ):
        with pytest.raises(ValueError, match=said):
            average_precision(found, there)


def test_a_model_says_its_likeliest_label_of_every_place():
    scores, boxes = answers_of(2)
    first, _ = found_objects(scores, boxes)
    shares = np.exp(scores[0]) / np.exp(scores[0]).sum(-1, keepdims=True)
    np.testing.assert_array_equal(first.labels, shares[:, :-1].argmax(-1))
    np.testing.assert_allclose(first.scores, shares[:, :-1].max(-1), rtol=1e-5)
    np.testing.assert_array_equal(first.boxes, boxes[0])

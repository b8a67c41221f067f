"""Images that a config has changed and mixed: the same for any host, told by their shares, learned end to end."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labels import experiment, session_of
from test_image_folders import COLOURS, MODEL, write_images

from jaxcost.data import DataConfig
from jaxcost.data.augmentation import AugmentConfig, AugmentImagesConfig
from jaxcost.data.examples import open_examples
from jaxcost.evaluation.losses import cross_entropy, shared_cross_entropy
from jaxcost.objectives import learned_batches, scored_batches
from jaxcost.planning.steps import trace_step
from jaxcost.training.config import TrainingConfig
from jaxcost.training.distill import DistillConfig

EVERYTHING = AugmentImagesConfig(flip=0.5, crop=1, operations=2, magnitude=0.2, mixup=0.2, cutmix=1.0)
CLASSES = len(COLOURS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def data(folder, images, **changes):
    settings = {"inputs": "images", "sequence_length": 4, "batch_size": 6, "cache_dir": str(folder.parent / "cache")}
    return settings | {"augment": AugmentConfig(images=images)} | changes


def batches(folder, images, count=8, model=MODEL, **part):
    asked = DataConfig(sources=(str(folder),), objective="labels", **data(folder, images))
    made = learned_batches(asked, open_examples(asked, "train"), None, model, **part)
    return list(itertools.islice(made, count))


def mixed_batches(folder, **alphas):
    """Batches as they are and mixed, of the same rows."""
    return zip(batches(folder, AugmentImagesConfig()), batches(folder, AugmentImagesConfig(**alphas)), strict=True)


def partners(plain, row):
    """The rows of a batch that are another label than one of them; a plain label's own share says nothing of them."""
    return [i for i in range(len(plain["targets"])) if plain["targets"][i] != plain["targets"][row]]


def test_mixup_mixes_two_images_and_their_labels_in_the_same_shares(folder):
    shares = []
    for plain, mixed in mixed_batches(folder, mixup=1.0):
        assert mixed["shares"].dtype == np.float32 and mixed["shares"].shape == (6, 1, CLASSES)
        np.testing.assert_allclose(mixed["shares"].sum(axis=-1), 1, rtol=1e-6)
        for row, share in enumerate(mixed["shares"][:, 0]):
            own = share[plain["targets"][row, 0]]
            if own < 1:  # mixed with another label, so that the share of its own image is that of its label
                sums = [own * plain["inputs"][row] + (1 - own) * plain["inputs"][i] for i in partners(plain, row)]
                assert min(np.abs(one - mixed["inputs"][row]).max() for one in sums) < 1e-5
                shares.append(own)
    assert len(shares) > 10 and np.ptp(shares) > 0.3


def test_cutmix_shows_a_rectangle_of_another_image_as_large_as_its_labels_share(folder):
    areas = []
    for plain, mixed in mixed_batches(folder, cutmix=1.0):
        for row, share in enumerate(mixed["shares"][:, 0]):
            own = share[plain["targets"][row, 0]]
            if own < 1:
                kept = (mixed["inputs"][row] == plain["inputs"][row]).all(axis=-1)
                assert kept.mean() == pytest.approx(own, abs=0.05)  # pixels of both may be the same
                other = [(mixed["inputs"][row] == plain["inputs"][i]).all(axis=-1) for i in partners(plain, row)]
                assert any((kept | seen).all() for seen in other)
                areas.append(1 - own)
    assert len(areas) > 10 and np.ptp(areas) > 0.3


@pytest.mark.parametrize("images", [EVERYTHING, dataclasses.replace(EVERYTHING, mixup=0, cutmix=0)])
def test_changed_images_are_the_same_again_and_for_any_number_of_hosts_and_others_every_epoch(folder, images):
    whole = batches(folder, images, 12, numbered=True)  # two epochs
    halves = [batches(folder, images, 12, numbered=True, rows=rows) for rows in (range(3), range(3, 6))]
    for i, batch in enumerate(whole):
        assert batch["inputs"].shape == (6, 8, 8, 3) and batch["inputs"].dtype == np.float32
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([half[i][name] for half in halves]))
    for one, other in zip(whole[5:], batches(folder, images, 7, start_step=5), strict=True):
        np.testing.assert_array_equal(one["inputs"], other["inputs"])
    shown = {}
    for batch in whole:
        for record, image in zip(batch["records"], batch["inputs"], strict=True):
            shown.setdefault(int(record), []).append(image)
    assert len(shown) == 36
    assert np.mean([np.array_equal(*both) for both in shown.values()]) < 0.2


def test_images_are_changed_by_strength_alone_and_in_gray_too(folder):
    plain = batches(folder, AugmentImagesConfig())
    for one, other in zip(plain, batches(folder, AugmentImagesConfig(flip=1.0)), strict=True):
        np.testing.assert_array_equal(one["inputs"][:, :, ::-1], other["inputs"])
        assert "shares" not in other
    gray = dataclasses.replace(MODEL, images=dataclasses.replace(MODEL.images, channels=1))
    for batch in batches(folder, EVERYTHING, model=gray):
        assert batch["inputs"].shape == (6, 8, 8, 1) and np.abs(batch["inputs"]).max() <= 1


def test_a_loss_of_shares_is_that_of_the_labels_in_their_shares():
    draw = np.random.default_rng(0)
    logits_BTC = jnp.asarray(draw.normal(size=(4, 1, CLASSES)), jnp.float32)
    labels_BT, others_BT = (jnp.asarray(draw.integers(0, CLASSES, (4, 1))) for _ in range(2))
    mask_BT = jnp.array([[1.0], [1.0], [0.0], [1.0]])
    eye = jnp.eye(CLASSES)

    def given(hidden, key):
        return hidden

    one, two = (cross_entropy(logits_BTC, given, labels, mask_BT)[0] for labels in (labels_BT, others_BT))
    mixed, count = shared_cross_entropy(logits_BTC, given, 0.3 * eye[labels_BT] + 0.7 * eye[others_BT], mask_BT)
    assert count == 3 and float(mixed) == pytest.approx(0.3 * float(one) + 0.7 * float(two), rel=1e-6)


def test_a_model_learns_changed_images_and_is_scored_on_plain_ones(folder, tmp_path):
    value = experiment(
        folder, MODEL, "labels", data=data(folder, EVERYTHING, batch_size=16), training=TrainingConfig(steps=40)
    )
    session = session_of(value)
    step = trace_step("train", value, 0, session.mesh)
    assert {name: (a.shape, a.dtype) for name, a in next(session.train_batches()).items()} == {
        name: (a.shape, a.dtype) for name, a in step.arguments[1].items()
    }
    fitted = session.train(tmp_path / "run")
    assert fitted.metrics["accuracy"] == 1.0
    # Two labels cannot both be told for sure: the loss stays above that of plain images.
    assert np.mean(fitted.losses[-5:]) > 0.2
    plain = dataclasses.replace(value.data, augment=AugmentConfig())
    scored = (
        scored_batches(config, session.validation_stream, session.tokenizer, MODEL, None)
        for config in (value.data, plain)
    )
    for one, other in zip(*scored, strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_what_cannot_be_asked_for_is_one_sentence(folder):
    for strength, message in (
        ({"flip": 2.0}, "data.augment.images.flip is 2.0; it must lie between 0 and 1"),
        ({"crop": -1}, "data.augment.images.crop is -1; it cannot be negative"),
        ({"protected": ("turn",)}, "data.augment.images.protected has 'turn', which is no change"),
    ):
        with pytest.raises(ValueError, match=message):
            AugmentImagesConfig(**strength)
    with pytest.raises(ValueError, match="data.augment.images changes images, and data.inputs is 'texts'"):
        DataConfig(objective="labels", augment=AugmentConfig(images=EVERYTHING))
    with pytest.raises(ValueError, match="the other fields of data.augment, and data.select, are for texts"):
        experiment(folder, MODEL, "labels", data=data(folder, EVERYTHING, augment=AugmentConfig(swap=0.1)))
    with pytest.raises(ValueError, match="images.crop is 8, and the model's images have 8 x 8 pixels"):
        experiment(folder, MODEL, "labels", data=data(folder, AugmentImagesConfig(crop=8)))
    with pytest.raises(ValueError, match="a teacher takes one label for each; set mixup and cutmix to 0"):
        distill = DistillConfig(teacher="x", logits=1.0)
        experiment(folder, MODEL, "labels", data=data(folder, EVERYTHING), distill=distill)

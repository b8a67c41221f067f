"""Folders of images, and TFDS datasets of them: labels, splits, what is damaged, and a small model that learns them."""

import dataclasses
import io
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from labels import ENCODER, experiment, session_of
from PIL import Image

from jaxcost.data import DataConfig, open_source, train_batches
from jaxcost.data.examples import open_examples
from jaxcost.data.images import image_row, read_image
from jaxcost.data.records import BadRecord
from jaxcost.labelling import labeller
from jaxcost.models.config import HeadConfig, ImageConfig
from jaxcost.planning.steps import trace_step
from jaxcost.training.config import TrainingConfig

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
MODEL = dataclasses.replace(
    ENCODER, images=ImageConfig(patch=4, height=8, width=8), head=HeadConfig(outputs=3, pooling="mean")
)

TRAINING = TrainingConfig(steps=20, evaluate_every=20)
CHANNELS = dataclasses.replace(MODEL.images, channels=2)


def write_images(root):
    """Noisy squares of a colour, of several sizes and formats, in folders of their colours."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = draw.integers(6, 20, 2)
                pixels = np.clip(np.array(colour) + draw.normal(0, 60, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.{('png', 'jpg', 'PNG', 'bmp')[i % 4]}")
    (root / "README.md").write_text("Not an image.")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def config(folder, tmp_path, **changes):
    settings = {"batch_size": 5, "sequence_length": 4, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(sources=(str(folder),), inputs="images", objective="labels", **settings | changes)


@pytest.mark.slow
def test_a_model_learns_the_folders_of_images_and_a_plan_is_of_its_batches(folder, tmp_path):
    data = {"inputs": "images", "sequence_length": 4, "cache_dir": str(tmp_path / "cache")}
    value = experiment(folder, MODEL, "labels", data=data, training=TRAINING)
    session = session_of(value)
    step = trace_step("train", value, 0, session.mesh)
    assert {name: (a.shape, a.dtype) for name, a in next(session.train_batches()).items()} == {
        name: (a.shape, a.dtype) for name, a in step.arguments[1].items()
    }
    fitted = session.train(tmp_path / "run")
    assert fitted.metrics["accuracy"] == 1.0 and fitted.metrics["scored_examples"] == 12
    assert fitted.totals["tokens"] == 20 * 16 * MODEL.images.tokens
    assert session.train_stream.labels == tuple(COLOURS) and session.purchases["labels"] == 36
    with pytest.raises(ValueError, match="is 'labels' of images; give a training with .* data.inputs 'texts'"):
        labeller(session, ["a text"])


def test_images_are_read_by_index_with_their_folder_as_the_label(folder, tmp_path):
    asked = config(folder, tmp_path)
    examples = open_examples(asked, "train[:50%]+validation")
    assert len(examples) == 18 + 12
    for i in (0, 17, 18, 29):
        label = examples.labels[examples[i]["label"]]
        assert f"/{label}/" in examples.shown(i)
        assert examples[i]["image"].dtype == np.uint8
        np.testing.assert_array_equal(examples[i]["image"], Image.open(examples.shown(i)).convert("RGB"))
        assert abs(examples[i]["image"].mean(axis=(0, 1)) - COLOURS[label]).max() < 60
    with pytest.raises(ValueError, match="has no split 'test'"):
        open_source(asked, "test")


def test_batches_are_the_same_again_and_for_any_number_of_hosts(folder, tmp_path):
    asked = config(folder, tmp_path, batch_size=6)
    examples = open_examples(asked, "train")

    def batches(**part):
        made = train_batches(asked, examples, prepare=lambda one, _: image_row((8, 8, 3), one), **part)
        return list(itertools.islice(made, 7))  # more than an epoch

    whole, halves = batches(), [batches(rows=rows) for rows in (range(3), range(3, 6))]
    for i, batch in enumerate(whole):
        assert batch["inputs"].shape == (6, 8, 8, 3) and batch["inputs"].dtype == np.float32
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([half[i][name] for half in halves]))
    for one, other in zip(whole[3:], batches(start_step=3), strict=False):
        np.testing.assert_array_equal(one["inputs"], other["inputs"])


def test_damaged_images_are_counted_named_and_left_out_up_to_a_limit(tmp_path):
    root = write_images(tmp_path / "images")
    whole = (root / "train" / "red" / "0.png").read_bytes()
    (root / "train" / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "blue" / "1.jpg").write_bytes(b"GIF89a")
    (root / "train" / "green" / "2.PNG").write_bytes(b"")
    (root / "train" / "green" / "3.bmp").write_bytes(whole + bytes(9000))
    asked = config(root, tmp_path, max_record_bytes=5000)
    for _ in range(2):  # the second time, what was found is read from disk
        examples = open_examples(asked, "train")
        assert len(examples) == 36 - 4
        names = {said.split()[0] for said in examples.skipped}
        assert names == {"train/red/0.png", "train/blue/1.jpg", "train/green/2.PNG", "train/green/3.bmp"}
    with pytest.raises(
        ValueError, match=r"4 records of .* are corrupt, more than data.max_corrupt_records \(3\): train/b"
    ):
        open_examples(dataclasses.replace(asked, max_corrupt_records=3), "train")
    with pytest.raises(BadRecord, match="cannot be read"):
        read_image(root / "train" / "red" / "0.png", 5000)


def test_pixels_go_from_minus_one_to_one_in_the_size_and_channels_of_the_model():
    image = np.zeros((5, 9, 3), np.uint8)
    image[:, :, 0] = 255
    row = image_row((8, 12, 3), {"image": image, "label": 2})
    assert row["inputs"].shape == (8, 12, 3) and row["targets"].tolist() == [2] and row["mask"].tolist() == [1]
    assert np.unique(row["inputs"][..., 0]) == 1 and np.unique(row["inputs"][..., 1:]) == -1
    assert image_row((8, 12, 1), {"image": image, "label": 2})["inputs"].shape == (8, 12, 1)


def test_what_cannot_be_read_or_learned_is_one_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match="lies in no folder that names its label; put it into one"):
        open_source(config(folder / "train" / "red", tmp_path), "train")
    stray = write_images(tmp_path / "stray")
    (stray / "train" / "red" / "0.png").rename(stray / "train" / "0.png")
    with pytest.raises(ValueError, match=r"train/0.png' lies in no folder that names its label"):
        open_source(config(stray, tmp_path), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file that can be read; give one of .png"):
        open_source(config(tmp_path / "empty", tmp_path), "train")
    with pytest.raises(ValueError, match="of which labels are learned; set data.objective to 'labels'"):
        DataConfig(inputs="images")
    with pytest.raises(ValueError, match="data.sequence_length is 16, and an image makes 4 tokens"):
        experiment(folder, MODEL, "labels", data={"inputs": "images"})
    data = {"inputs": "images", "sequence_length": 4}
    for images, message in ((ImageConfig(), "takes a model of images"), (CHANNELS, "model.images.channels is 2")):
        model = dataclasses.replace(MODEL, images=images)
        with pytest.raises(ValueError, match=message):
            session_of(experiment(folder, model, "labels", data=data)).open()


# ---- TFDS ----


class Squares(tfds.core.GeneratorBasedBuilder):
    """Image files of a folder as a dataset of TFDS, the last one of the train split cut off."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"picture": tfds.features.Image(), "colour": tfds.features.ClassLabel(names=list(COLOURS))}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        root = write_images(Path(tempfile.mkdtemp(dir=self._data_dir_root)))
        return {split: self._generate_examples(root / split) for split in ("train", "validation")}

    def _generate_examples(self, folder):
        paths = sorted(path for path in folder.rglob("*.*") if path.suffix != ".bmp")
        for i, path in enumerate(paths):
            held = path.read_bytes()
            broken = folder.name == "train" and i == len(paths) - 1
            yield i, {"picture": io.BytesIO(held[:20] if broken else held), "colour": path.parent.name}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def test_a_dataset_of_images_is_read_and_learned(data_dir, tmp_path):
    asked = {"inputs": "images", "objective": "labels", "name": "squares", "data_dir": data_dir, "batch_size": 5}
    asked |= {"text_field": "picture", "label_field": "colour", "sequence_length": 4}
    examples = open_examples(DataConfig(**asked), "train")
    assert (len(examples), examples.labels) == (27, tuple(COLOURS))
    colours = np.array(list(COLOURS.values()))
    for example in examples[:26]:
        assert abs(example["image"].mean(axis=(0, 1)) - colours[example["label"]]).max() < 60
    assert examples.shown(3) == "record 3 of squares-1.0.0-train"
    with pytest.raises(ValueError, match="Record 26 of squares-1.0.0-train cannot be read .*; mend it"):
        examples[26]
    value = experiment(
        tmp_path, MODEL, "labels", data=asked | {"sources": (), "train_split": "train[:26]"}, training=TRAINING
    )
    assert session_of(value).train(tmp_path / "run").metrics["accuracy"] == 1.0


def test_a_dataset_without_such_images_is_refused(data_dir):
    asked = DataConfig(inputs="images", objective="labels", name="squares", data_dir=data_dir, label_field="colour")
    with pytest.raises(ValueError, match="'squares' has no image feature 'text'; set data.text_field to one of pic"):
        open_source(asked, "train")
    asked = dataclasses.replace(asked, name="python_text/reference")
    with pytest.raises(ValueError, match="has no image feature 'text'; set data.name to a dataset of images"):
        open_source(asked, "train")

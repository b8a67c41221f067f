"""/v1/classify of images: each gets the labels that it gets alone from the library, and what is no image is refused."""

import base64
import contextlib
import dataclasses
import functools
import io
import json
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from serving import TOKENIZER
from test_api import ask, listening
from test_scheduler import compilations

from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.data.images import image_row
from jaxcost.models.config import HeadConfig, ImageConfig, ModelConfig
from jaxcost.models.transformer import Transformer, initialize, logits
from jaxcost.serving.api.app import create_app
from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.kinds import model_of_kind
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.pooling import ImageModel, Labels
from jaxcost.serving.batches import Batcher, BatchesConfig
from jaxcost.serving.pictures import Pictures
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import SchedulerConfig

IMAGES = ImageConfig(patch=4, height=12, width=16, class_tokens=1)
CONFIG = ModelConfig(
    vocab_size=0,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_width=48,
    norm="layer",
    position="learned",
    causal=False,
    images=IMAGES,
    max_length=IMAGES.tokens,
    head=HeadConfig(outputs=3, pooling="first", bias=True),
)
NAMES = ("cat", "dog", "tree")
SIZES = [(12, 16), (40, 30), (7, 90), (12, 16)]


@functools.cache
def params():
    return jax.jit(lambda key: initialize(Transformer(CONFIG), key)[0])(jax.random.key(0))


@functools.cache
def pictures():
    """Shared by all tests of a process."""
    return Pictures(Transformer(CONFIG), params(), BatchesConfig(rows=(1, 4)))


@contextlib.contextmanager
def serving(config=ApiConfig(), queue=256):  # noqa: B008
    batcher = Batcher(pictures(), SchedulerConfig(queue))
    model = ImageModel("small", Vocabulary(TOKENIZER), batcher, Labels(NAMES))
    metrics = Metrics("small", resolve(HardwareConfig("h100", 1)))
    metrics.watch(model.worker)
    with listening(create_app(model, metrics, config=config)) as port:
        yield port, model
    assert not model.healthy


@pytest.fixture(scope="module")
def server():
    with serving() as (port, _):
        yield port


def image(index):
    height, width = SIZES[index]
    return np.random.default_rng(index).integers(0, 256, (height, width, 3)).astype(np.uint8)


def part(content, kind="png"):
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def file(pixels, kind="PNG"):
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, kind)
    return made.getvalue()


@functools.cache
def labels():
    def made(own, images_BHWC):
        hidden, _ = Transformer(CONFIG).apply({"params": own}, images_BHWC)
        return jax.nn.softmax(logits(CONFIG, own, hidden[:, 0]))

    return jax.jit(made)


def alone(index):
    """The probabilities of an image by itself, as training and scoring read it."""
    row = image_row((12, 16, 3), {"image": image(index), "label": 0})
    return np.asarray(labels()(params(), row["inputs"][None])[0])


def test_many_clients_get_what_each_image_gets_alone_and_nothing_is_compiled(server):
    want, found = [alone(i) for i in range(4)], {}
    assert np.ptp(want, axis=0).max() > 0.01

    def one(i):
        both = [part(file(image(i % 4))), part(file(image((i + 1) % 4)))]
        found[i] = json.loads(ask(server, "/v1/classify", {"model": "small", "input": both})[2])

    with compilations() as compiled:
        threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not compiled
    for i, answer in found.items():
        for entry, own in zip(answer["data"], (want[i % 4], want[(i + 1) % 4]), strict=True):
            np.testing.assert_allclose(entry["probs"], own, atol=1e-5)
            assert entry["label"] == NAMES[own.argmax()] and entry["num_classes"] == 3
        assert answer["usage"]["prompt_tokens"] == 2 * IMAGES.tokens and answer["usage"]["cost_usd"] > 0
    single = json.loads(ask(server, "/v1/classify", {"input": part(file(image(0)))})[2])["data"]
    np.testing.assert_allclose(single[0]["probs"], want[0], atol=1e-5)


def bomb():
    """A small file of many pixels."""
    return file(np.zeros((9000, 9000), np.uint8))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a text", "labels images, and does not label texts"),
        ([], "There is nothing to read"),
        (part(b""), "An image cannot be read"),
        (part(b"no image" * 20), "it is none of PNG, JPEG, WEBP"),
        (part(file(np.zeros((30, 30, 3), np.uint8), "EPS")), "it is none of PNG, JPEG, WEBP"),
        # Where its rows lie is written as text.
        (
            part(file(np.zeros((30, 30, 3), np.uint8), "TIFF").replace(b"\x11\x01\x04", b"\x11\x01\x02")),
            "cannot be read",
        ),
        (part(file(np.zeros((30, 30, 3), np.uint8), "JPEG")[:-200], "jpeg"), "An image cannot be read"),
        (part(bomb()), "9000 x 9000 pixels, more than"),
        ([part(file(np.zeros((4000, 4000), np.uint8)))] * 2, "pixels, more than 4000000"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}, "not base64"),
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "send it as data:"),
        ({"type": "image_url"}, "input"),
    ],
    ids=lambda value: repr(value)[-30:],
)
def test_what_is_no_image_is_refused_in_openai_s_form(server, given, said):
    status, _, text = ask(server, "/v1/classify", {"input": given})
    error = json.loads(text)["error"]
    assert status == 400 and set(error) == {"message", "type", "param", "code"} and said in error["message"]


def test_other_addresses_say_what_the_model_does(server):
    for path, body, said in (
        ("/v1/embeddings", {"input": "a"}, "does not embed"),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "does not rank"),
        ("/v1/completions", {"prompt": "a"}, "does not continue texts"),
        ("/v1/chat/completions", {}, "does not continue texts"),
        ("/v1/audio/transcriptions", {}, "does not hear recordings"),
    ):
        status, _, text = ask(server, path, body)
        error = json.loads(text)["error"]
        assert (status, error["code"]) == (400, "unsupported_model") and said in error["message"]
    assert json.loads(ask(server, "/v1/models", method="GET")[2])["data"][0]["id"] == "small"
    assert ask(server, "/tokenize", {"prompt": "a"})[0] == 404


def test_what_cannot_be_served_is_said(tmp_path):
    options = {"tokenizer": TOKENIZER, "folder": tmp_path}
    states = dataclasses.replace(CONFIG, head=HeadConfig(embed=True))
    with pytest.raises(ValueError, match="gives no labels of whole images"):
        model_of_kind("small", Transformer(states), params(), **options)
    with pytest.raises(ValueError, match=r"batches.lengths is for texts and recordings"):
        model_of_kind("small", Transformer(CONFIG), params(), **options, batches=BatchesConfig(lengths=(4,)))
    broken = jax.tree.map(lambda a: a * np.nan, params())
    with pytest.raises(ValueError, match="give outputs that are no numbers"):
        model_of_kind("small", Transformer(CONFIG), broken, **options, batches=BatchesConfig(rows=(1,)))

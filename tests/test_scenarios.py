"""The synthetic datasets and their scenarios: the same everywhere, in classes, without a text in both splits."""

from pathlib import Path

import numpy as np
import pytest

from jaxcost.config import load
from jaxcost.data import DataConfig, open_source
from jaxcost.data.synthetic import customer_message, mistyped, news_sentence
from jaxcost.objectives import check_model

SCENARIOS = sorted((Path(__file__).parent.parent / "configs" / "scenarios").glob("*.py"))


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_a_scenario_fits_its_model_and_says_that_it_is_synthetic(path):
    experiment = load(path)
    check_model(experiment.data.objective, experiment.model)
    assert experiment.data.name.startswith("synthetic_") and "synthetic" in path.read_text().split('"""')[1]


@pytest.mark.parametrize("name, labels", [("customer_service", 10), ("financial_news", 3)])
def test_no_text_is_in_both_splits_and_every_label_is_in_each(name, labels, tmp_path):
    config = DataConfig(name=f"synthetic_{name}", objective="labels", data_dir=str(tmp_path))
    train, validation = open_source(config, "train"), open_source(config, "validation")
    assert (len(train), len(validation)) == (4000, 1000)
    assert len({*train, *validation}) == 5000
    for source in (train, validation):
        found = [source.record(i, ("label",))["label"] for i in range(len(source))]
        assert np.bincount(found, minlength=labels).min() > len(source) / labels / 2
        assert len(source.classes) == labels
    assert open_source(config, "train")[7] == train[7]


def test_denials_and_hedges_change_what_news_say():
    draw = np.random.default_rng(0)
    made = [news_sentence(draw) for _ in range(2000)]

    def labels(*words):
        return {label for text, label in made if all(word in text for word in words)}

    assert labels("net sales", " rose ") == {"positive"} and labels("net debt", " rose ") == {"negative"}
    assert labels("net sales", "failed to grow") == {"negative"} and labels("net debt", "failed to grow") == {
        "positive"
    }
    assert labels(" might ") == {"neutral"}


def test_what_a_customer_does_not_want_is_not_the_label():
    draw = np.random.default_rng(0)
    made = [customer_message(draw) for _ in range(1000)]
    denied = [label for text, label in made if "i will not close my account" in text]
    assert denied and "close_account" not in denied


def test_typing_errors_are_as_many_as_asked():
    text = "abcdefghij" * 500
    assert mistyped(np.random.default_rng(0), text, 0.0) == text
    noisy = mistyped(np.random.default_rng(0), text, 0.3)
    assert noisy != text and 0.9 < len(noisy) / len(text) < 1.1

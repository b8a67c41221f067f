"""Translation there and back by small models that the test trains on parallel texts that it makes, beside EDA."""

import dataclasses
import json

import numpy as np
import pytest
from labels import ENCODER, experiment, session_of

from jaxcost.data.augmentation import AugmentConfig
from jaxcost.data.augmentation.text import changed
from jaxcost.data.examples import source_row
from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.labelling import agreed
from jaxcost.models.config import HeadConfig
from jaxcost.models.parts import EncoderConfig
from jaxcost.planning.steps import trace_step
from jaxcost.serving.sampling import Sampling
from jaxcost.session import load_run
from jaxcost.training.config import OptimizerConfig, TrainingConfig
from jaxcost.translation import Translator, back_translate, translated_copies

MODEL = dataclasses.replace(ENCODER, causal=True, encoder=EncoderConfig(num_layers=1))
MEANINGS = {"p": "ab", "q": "cd", "r": "ef", "s": "gh"}
"""Two words of ours, of one letter, stand for each letter of theirs, so that what comes back may say it otherwise."""
CLASSIFIER = dataclasses.replace(ENCODER, head=HeadConfig(outputs=4, pooling="mean"))


def texts_of(draw, count):
    """Texts of four of our words, and what they mean, in theirs."""
    theirs = ["".join(draw.choice(list(MEANINGS), 4)) for _ in range(count)]
    return [" ".join(draw.choice(list(MEANINGS[letter])) for letter in text) for text in theirs], theirs


def write_parallel(folder, ours_first):
    """Parallel texts; which of our words stands for one of theirs is drawn."""
    folder.mkdir()
    for seed, (split, count) in enumerate((("train", 600), ("validation", 40))):
        with open(folder / f"{split}.jsonl", "w") as file:
            for ours, theirs in zip(*texts_of(np.random.default_rng(seed), count), strict=True):
                pair = (ours, theirs) if ours_first else (theirs, ours)
                file.write(json.dumps(dict(zip(("text", "answer"), pair, strict=True))) + "\n")
    return folder


def translator(folder, ours_first, steps):
    value = experiment(
        write_parallel(folder / f"texts_{ours_first}", ours_first),
        MODEL,
        "answers",
        data={"sequence_length": 8, "batch_size": 64},
        training=TrainingConfig(steps=steps),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20),
    )
    fitted = session_of(value).train(folder / f"run_{ours_first}")
    return Translator.load(folder / f"run_{ours_first}"), fitted


def meaning(ours):
    letters = {mine: theirs for theirs, both in MEANINGS.items() for mine in both}
    return "".join(letters.get(word, "?") for word in ours.split())


def classifier(folder):
    """A training that tells the first word's meaning, whichever of the two words it is."""
    folder.mkdir()
    for seed, (split, count) in enumerate((("train", 600), ("validation", 100))):
        with open(folder / f"{split}.jsonl", "w") as file:
            for ours, theirs in zip(*texts_of(np.random.default_rng(100 + seed), count), strict=True):
                file.write(json.dumps({"text": ours, "label": theirs[0]}) + "\n")
    value = experiment(folder, CLASSIFIER, "labels", data={"batch_size": 64}, training=TrainingConfig(steps=200))
    fitted = session_of(value).train(folder / "run")
    return load_run(folder / "run")[:2], fitted


@pytest.mark.slow
def test_texts_come_back_in_other_words_and_mean_the_same_more_often_than_by_eda(tmp_path):
    there, fitted = translator(tmp_path, True, 600)
    assert fitted.metrics["nats_per_token"] < 0.3
    back, _ = translator(tmp_path, False, 600)
    texts, theirs = texts_of(np.random.default_rng(7), 50)
    assert np.mean([made == right for right, made in zip(theirs, there(texts), strict=True)]) >= 0.9

    sampling = Sampling(temperature=1.0)
    made = back_translate(texts, there, back, sampling, tmp_path / "cache")
    assert np.mean([meaning(m) == right for m, right in zip(made, theirs, strict=True)]) >= 0.85
    # Chance leaves one in sixteen as it was.
    assert np.mean([m != text for m, text in zip(made, texts, strict=True)]) >= 0.8
    assert len(list((tmp_path / "cache").iterdir())) == 1
    nobody = dataclasses.replace(sampling)
    assert back_translate(texts, there, back, nobody, tmp_path / "cache") == made
    assert back_translate(texts[:5], there, back, sampling) == made[:5]

    (teacher, params), fitted = classifier(tmp_path / "labelled")
    assert fitted.metrics["accuracy"] >= 0.95
    draw = np.random.default_rng(8)
    eda = AugmentConfig(insert=0.2, swap=0.2, delete=0.2, untouched=0.0)
    copies = {"translated": made, "EDA": [changed(eda, text, draw) for text in texts]}
    labels = [teacher.train_stream.labels.index(right[0]) for right in theirs]
    share = {}
    for name, texts_made in copies.items():
        records = [{"text": text, "label": label} for text, label in zip(texts_made, labels, strict=True)]
        share[name] = len(agreed(teacher, params, records)[0]) / len(records)
    print(f"the classifier agrees with the label: {share}")
    assert share["translated"] >= share["EDA"]


def test_a_source_row_is_what_an_encoder_decoder_learns_from():
    row = source_row(ByteTokenizer(), 5, 9, {"text": "abc", "answer": "de"})
    assert row["source"].tolist() == [97, 98, 99, 0, 0] and row["source_valid"].tolist() == [True] * 3 + [False] * 2
    assert row["inputs"].tolist() == [9, 100, 101, 256, 0] and row["targets"].tolist() == [100, 101, 256, 0, 0]
    assert row["mask"].tolist() == [1, 1, 1, 0, 0]


def test_a_plan_of_answers_is_of_the_batches_that_are_learned_from(tmp_path):
    value = experiment(write_parallel(tmp_path / "texts", True), MODEL, "answers", data={"sequence_length": 8})
    session = session_of(value)
    step = trace_step("train", value, session.model.config.vocab_size, session.mesh)
    assert {name: (a.shape, a.dtype) for name, a in next(session.train_batches()).items()} == {
        name: (a.shape, a.dtype) for name, a in step.arguments[1].items()
    }
    with pytest.raises(ValueError, match="takes a model with an encoder of texts"):
        plain = dataclasses.replace(value, model=dataclasses.replace(MODEL, encoder=EncoderConfig()))
        Translator(session_of(plain), {}, "none")


def test_copies_are_kept_where_they_are_other_texts():
    examples = [{"text": text, "label": "x"} for text in ("a b", "c", "d")]
    copies, counts = translated_copies(examples, ["a  b", " ", "e"])
    assert copies == [{"text": "e", "label": "x", "origin": "translated"}]
    assert counts == {"translated": 3, "unchanged": 1, "empty": 1, "kept": 1}

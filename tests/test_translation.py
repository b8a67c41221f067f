"""Translation there and back by small models that the test trains on parallel texts that it makes."""

import dataclasses
import json

import numpy as np
import pytest
from labels import ENCODER, experiment, session_of

from jaxcost.data.augmentation import AugmentConfig
from jaxcost.data.augmentation.text import changed
from jaxcost.data.examples import source_row
from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.labelling import labeller
from jaxcost.models.config import HeadConfig
from jaxcost.models.parts import EncoderConfig
from jaxcost.planning.steps import trace_step
from jaxcost.serving.sampling import Sampling
from jaxcost.training.config import OptimizerConfig, TrainingConfig
from jaxcost.translation import Translator, back_translate, translated_copies

MODEL = dataclasses.replace(ENCODER, causal=True, encoder=EncoderConfig(num_layers=1))
MEANINGS = {"p": "ab", "q": "cd", "r": "ef", "s": "gh"}
"""Two letters of ours stand for each letter of theirs, so that what comes back may be spelled otherwise."""


def write_parallel(folder, ours_first):
    """Parallel texts of four letters; which of ours stands for one of theirs is drawn."""
    folder.mkdir()
    for seed, (split, count) in enumerate((("train", 600), ("validation", 40))):
        draw = np.random.default_rng(seed)
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                theirs = "".join(draw.choice(list(MEANINGS), 4))
                ours = "".join(draw.choice(list(MEANINGS[letter])) for letter in theirs)
                pair = (ours, theirs) if ours_first else (theirs, ours)
                file.write(json.dumps(dict(zip(("text", "answer"), pair, strict=True))) + "\n")
    return folder


def translator(folder, ours_first, steps):
    value = experiment(
        write_parallel(folder / f"texts_{ours_first}", ours_first),
        MODEL,
        "answers",
        data={"sequence_length": 6, "batch_size": 64},
        training=TrainingConfig(steps=steps),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20),
    )
    fitted = session_of(value).train(folder / f"run_{ours_first}")
    return Translator.load(folder / f"run_{ours_first}"), fitted


def meaning(ours):
    letters = {mine: theirs for theirs, both in MEANINGS.items() for mine in both}
    return "".join(letters.get(letter, "?") for letter in ours)


def topic(ours):
    """What a text says most often, or first of what it says as often: it hangs on all letters and on their order."""
    said = meaning(ours)
    return max(said, key=said.count)


def write_topics(folder, texts, held):
    """Texts with their topics as labels."""
    folder.mkdir()
    for split, some in (("train", texts), ("validation", held)):
        with open(folder / f"{split}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text, "label": topic(text)}) + "\n" for text in some)
    return folder


@pytest.fixture(scope="module")
def translators(tmp_path_factory):
    """One of each direction."""
    root = tmp_path_factory.mktemp("translators")
    there, fitted = translator(root, True, 600)
    assert fitted.metrics["nats_per_token"] < 0.3
    return there, translator(root, False, 600)[0]


@pytest.mark.slow
def test_texts_come_back_in_other_letters_and_mean_the_same(translators, tmp_path):
    there, back = translators
    draw = np.random.default_rng(7)
    texts = ["".join(draw.choice(list("abcdefgh"), 4)) for _ in range(50)]
    assert np.mean([made == meaning(text) for text, made in zip(texts, there(texts), strict=True)]) >= 0.9

    sampling = Sampling(temperature=1.0)
    made = back_translate(texts, there, back, sampling, tmp_path / "cache")
    assert np.mean([meaning(m) == meaning(text) for m, text in zip(made, texts, strict=True)]) >= 0.85
    # Chance leaves one in sixteen as it was.
    assert np.mean([m != text for m, text in zip(made, texts, strict=True)]) >= 0.8
    assert len(list((tmp_path / "cache").iterdir())) == 1
    nobody = dataclasses.replace(sampling)
    assert back_translate(texts, there, back, nobody, tmp_path / "cache") == made
    assert back_translate(texts[:5], there, back, sampling) == made[:5]


@pytest.mark.slow
def test_labels_survive_translation_at_least_as_often_as_words_moved_and_left_out(translators, tmp_path):
    draw = np.random.default_rng(9)
    texts = sorted({"".join(draw.choice(list("abcdefgh"), 4)) for _ in range(1200)})
    draw.shuffle(texts)
    held, learned = texts[:200], texts[200:]
    value = experiment(
        write_topics(tmp_path / "topics", learned, held),
        dataclasses.replace(ENCODER, head=HeadConfig(outputs=4, pooling="mean")),
        "labels",
        data={"sequence_length": 6, "batch_size": 64},
        training=TrainingConfig(steps=200),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20),
    )
    session = session_of(value)
    params = session.train(tmp_path / "run").params
    gold = [session.train_stream.labels.index(topic(text)) for text in held]

    def agreement(made):
        return np.mean(labeller(session, made).probabilities(params).argmax(axis=1) == gold)

    def others(made):
        return np.mean([m != text for m, text in zip(made, held, strict=True)])

    def moved(strength):
        """EDA's copies; each letter is a word. No letter has a synonym, so that none is put in."""
        eda = AugmentConfig(strength, insert=strength, swap=strength, delete=strength, untouched=0.0)
        return [changed(eda, " ".join(text), draw).replace(" ", "") for text in held]

    translated = back_translate(held, *translators, Sampling(temperature=1.0))
    assert agreement(held) >= 0.95 and others(translated) >= 0.8
    # 0.1 is the strength that EDA's authors use most, and 0.05 theirs for few examples.
    for strength in (0.05, 0.1):
        copies = moved(strength)
        assert others(copies) >= 0.2
        assert agreement(translated) >= agreement(copies), strength


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

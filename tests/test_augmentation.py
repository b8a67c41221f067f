"""Changed copies: by the same key the same, by strength as much as asked, and nothing that a label hangs on."""

import dataclasses
import re

import grain
import numpy as np
import pytest

from jaxcost.data import DataConfig
from jaxcost.data.augmentation import NEGATIONS, AugmentConfig
from jaxcost.data.augmentation.audio import AddNoise, ChangeSpeed, SpecAugment
from jaxcost.data.augmentation.config import OPERATIONS
from jaxcost.data.augmentation.images import CutMix, MixUp, RandAugment, RandomCrop, RandomFlip
from jaxcost.data.augmentation.items import CropItems, MaskItems, ReorderItems
from jaxcost.data.augmentation.tables import NEIGHBOURS, SHAPES, SYNONYMS
from jaxcost.data.augmentation.text import AugmentText, changed
from jaxcost.data.synthetic import news_sentence

TEXT = "The company did not buy a big house, but it may soon start to sell. "
LONG = TEXT * 200


def rng(seed=0):
    return np.random.default_rng(seed)


def only(**strengths):
    return AugmentConfig(untouched=0.0, protected=(), **strengths)


def words(text):
    return re.findall(r"[\w']+", text)


def test_nothing_is_changed_at_strength_zero_and_text_is_put_together_as_it_was():
    assert changed(AugmentConfig(), LONG, rng()) == LONG
    assert not AugmentConfig().active and not only().active and only(swap=0.1).active
    for text in ("", "...", "word", "  a  b!"):
        for name in ("synonyms", "insert", "swap", "delete", "keyboard", "recognition"):
            assert len(words(changed(only(**{name: 1.0}), text, rng()))) >= min(1, len(words(text)))


def test_synonyms_are_of_the_table_and_as_many_as_asked():
    before, after = words(LONG), words(changed(only(synonyms=0.5), LONG, rng()))
    known = [word.lower() in SYNONYMS for word in before]
    moved = [a != b for a, b in zip(before, after, strict=True)]
    assert not any(m and not k for m, k in zip(moved, known, strict=True))
    assert sum(moved) / sum(known) == pytest.approx(0.5, abs=0.08)
    assert all(b.lower() in SYNONYMS[a.lower()] for a, b in zip(before, after, strict=True) if a != b)


def test_words_are_inserted_swapped_and_deleted_as_asked():
    count = len(words(LONG))
    known = sum(word.lower() in SYNONYMS for word in words(LONG))
    assert len(words(changed(only(insert=0.2), LONG, rng()))) - count == pytest.approx(0.2 * known, rel=0.3)
    assert len(words(changed(only(delete=0.2), LONG, rng()))) == pytest.approx(0.8 * count, rel=0.05)
    swapped = changed(only(swap=0.2), LONG, rng())
    assert sorted(words(swapped)) == sorted(words(LONG)) and swapped != LONG
    assert changed(only(delete=1.0), "one two three", rng()) == "one"


@pytest.mark.parametrize("name, table", [("keyboard", NEIGHBOURS), ("recognition", SHAPES)])
def test_letters_are_mistaken_for_those_of_the_table(name, table):
    after = changed(only(**{name: 0.1}), LONG, rng())
    pairs = [(a, b) for a, b in zip(LONG, after, strict=True) if a != b]
    assert all(b in table.get(a, table.get(a.lower(), "")) for a, b in pairs)
    there = sum(a in table or a.lower() in table for a in LONG)
    assert len(pairs) / there == pytest.approx(0.1, abs=0.02)
    assert "s" in NEIGHBOURS["a"] and "q" in NEIGHBOURS["a"] and "p" not in NEIGHBOURS["a"]


def test_protected_words_stay_as_they_are_and_where_they_are_counted_from_each_other():
    everything = dataclasses.replace(
        only(synonyms=0.5, insert=0.3, swap=0.5, delete=0.5, keyboard=0.3, recognition=0.3),
        protected=(*NEGATIONS, "may"),
    )
    for seed in range(20):
        after = words(changed(everything, TEXT, rng(seed)))
        assert [word for word in after if word in ("not", "may")] == ["not", "may"]
    bare = dataclasses.replace(everything, protected=())
    assert any("not" not in words(changed(bare, TEXT, rng(seed))) for seed in range(20))


def test_denials_of_the_synthetic_news_survive():
    config, draw = AugmentConfig(synonyms=0.3, insert=0.2, swap=0.3, delete=0.3, untouched=0.0), rng()
    for _ in range(300):
        text, _ = news_sentence(draw)
        for word in ("not", "failed", "might", "could"):
            assert text.split().count(word) == changed(config, text, draw).split().count(word)


def test_the_same_seed_gives_the_same_texts_and_every_epoch_others():
    config = AugmentConfig(synonyms=0.3, swap=0.3, untouched=0.25)
    examples = [{"text": f"{TEXT} {i}", "label": i} for i in range(40)]

    def texts(seed):
        made = grain.MapDataset.source(examples).seed(seed).repeat(2).random_map(AugmentText(config))
        found = list(made)
        assert [example["label"] for example in found] == [*range(40), *range(40)]
        return [example["text"] for example in found]

    first = texts(0)
    assert first == texts(0) != texts(1) and first[:40] != first[40:]
    untouched = np.mean([text == example["text"] for text, example in zip(first, examples * 2, strict=True)])
    assert 0.1 < untouched < 0.45


def test_a_strength_out_of_range_or_without_texts_is_refused():
    with pytest.raises(ValueError, match="data.augment.swap is 2; it must lie between 0 and 1"):
        AugmentConfig(swap=2)
    with pytest.raises(ValueError, match="set data.objective to 'labels', 'regression' or 'answers'"):
        DataConfig(augment=AugmentConfig(swap=0.1))


IMAGE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


def test_images_are_flipped_and_moved():
    flipped = RandomFlip(1.0).random_map({"image": IMAGE}, rng())["image"]
    np.testing.assert_array_equal(flipped[:, ::-1], IMAGE)
    assert RandomFlip(0.0).random_map({"image": IMAGE}, rng())["image"] is IMAGE
    moved = RandomCrop(3).random_map({"image": IMAGE}, rng(1))["image"]
    assert moved.shape == IMAGE.shape
    padded = np.pad(IMAGE, ((3, 3), (3, 3), (0, 0)))
    at = [(r, c) for r in range(7) for c in range(7) if np.array_equal(padded[r : r + 12, c : c + 10], moved)]
    assert len(at) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_changes_by_its_magnitude_alone(channels):
    example = {"image": IMAGE[..., :channels]}
    strong = RandAugment(2, 0.8)
    made = [strong.random_map(example, rng(seed))["image"] for seed in range(30)]
    assert {(image.shape, image.dtype) for image in made} == {(example["image"].shape, np.dtype(np.uint8))}
    np.testing.assert_array_equal(made[3], strong.random_map(example, rng(3))["image"])
    assert np.mean([np.array_equal(image, example["image"]) for image in made]) < 0.2
    # At magnitude 0 what has a strength does nothing.
    weak = RandAugment(3, 0.0, protected=("autocontrast", "equalize", "solarize"))
    for seed in range(20):
        np.testing.assert_array_equal(weak.random_map(example, rng(seed))["image"], example["image"])
    with pytest.raises(ValueError, match="'turn', which is no change of RandAugment's"):
        RandAugment(protected=("turn",))
    with pytest.raises(ValueError, match="protected has all changes of RandAugment's; leave out at least one"):
        RandAugment(protected=OPERATIONS)


def test_mixed_images_have_labels_in_the_same_shares():
    batch = {"image": np.eye(6, dtype=np.float32)[:, :, None, None] * np.ones((6, 6, 8, 1)), "label": np.arange(6)}
    mixed = MixUp(6, alpha=1.0).random_map(batch, rng())
    np.testing.assert_allclose(mixed["image"][:, :, 0, 0], mixed["shares"], rtol=1e-6)
    np.testing.assert_allclose(mixed["shares"].sum(axis=1), 1, rtol=1e-6)
    flat = {"image": np.arange(6.0)[:, None, None, None] * np.ones((6, 8, 8, 1)), "label": np.arange(6)}
    cut = CutMix(6).random_map(flat, rng(2))
    for image, shares in zip(cut["image"], cut["shares"], strict=True):
        np.testing.assert_allclose(np.bincount(image.astype(int).ravel(), minlength=6) / 64, shares, atol=1e-6)


def test_audio_noise_is_as_loud_as_asked_and_speed_changes_the_length():
    audio = np.sin(np.arange(16_000) / 10).astype(np.float32)
    noisy = AddNoise(20, 20).random_map({"audio": audio}, rng())["audio"]
    assert noisy.dtype == np.float32
    decibels = 10 * np.log10(np.mean(audio**2) / np.mean((noisy - audio) ** 2))
    assert decibels == pytest.approx(20, abs=0.1)
    assert not AddNoise().random_map({"audio": np.zeros(8, np.float32)}, rng())["audio"].any()
    fast = ChangeSpeed(2.0, 2.0).random_map({"audio": audio}, rng())["audio"]
    assert len(fast) == 8000
    np.testing.assert_allclose(fast, audio[::2], atol=1e-6)


def test_spec_augment_hides_bands_within_its_bounds():
    shown = rng().normal(size=(50, 20)).astype(np.float32)
    hidden = SpecAugment(1, 5, 1, 9).random_map({"spectrogram": shown}, rng(3))["spectrogram"] == shown.mean()
    bands, stretches = hidden.all(axis=0).sum(), hidden.all(axis=1).sum()
    assert 0 < bands <= 5 and 0 < stretches <= 9
    assert hidden.sum() == bands * 50 + stretches * 20 - bands * stretches


def test_item_histories_are_cropped_hidden_and_reordered():
    items = {"items": np.arange(1, 21)}
    cropped = CropItems(0.5).random_map(items, rng())["items"]
    assert len(cropped) == 10 and (np.diff(cropped) == 1).all()
    masked = MaskItems(99, 0.3).random_map(items, rng())["items"]
    assert (masked == 99).sum() == 6 and (masked[masked != 99] == items["items"][masked != 99]).all()
    moved = ReorderItems(0.4).random_map(items, rng(1))["items"]
    changed_at = np.flatnonzero(moved != items["items"])
    assert sorted(moved) == sorted(items["items"]) and len(changed_at) >= 2 and np.ptp(changed_at) < 8
    assert (items["items"] == np.arange(1, 21)).all()

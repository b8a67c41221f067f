"""Words of the same meaning from a WordNet, a small one that the test makes, and what is said where there is none."""

import dataclasses
import sys

import numpy as np
import pytest

from jaxcost.data.augmentation import AugmentConfig, thesaurus
from jaxcost.data.augmentation.text import AugmentText, changed
from jaxcost.data.augmentation.thesaurus import synonyms

MEANINGS = {"v1": ("buy", "purchase", "pick up", "Acquire"), "n1": ("purchase", "order"), "n2": ("table",)}
CONFIG = AugmentConfig(synonyms=1.0, untouched=0.0, thesaurus="wordnet")


def lexicon():
    """The words and their meanings in the format of the Global WordNet Association."""
    words = sorted({word for group in MEANINGS.values() for word in group})
    entries = [(w, m) for w in words for m in MEANINGS if w in MEANINGS[m]]
    said = [
        f'<LexicalEntry id="small-{i}"><Lemma writtenForm="{word}" partOfSpeech="{meaning[0]}"/>'
        f'<Sense id="small-sense-{i}" synset="small-{meaning}"/></LexicalEntry>'
        for i, (word, meaning) in enumerate(entries)
    ]
    said += [f'<Synset id="small-{meaning}" ili="" partOfSpeech="{meaning[0]}"/>' for meaning in MEANINGS]
    head = 'id="small" label="Small" language="en" email="a@example.com" license="none" version="1"'
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE LexicalResource SYSTEM '
        '"http://globalwordnet.github.io/schemas/WN-LMF-1.0.dtd">\n'
        '<LexicalResource xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"<Lexicon {head}>{''.join(said)}</Lexicon></LexicalResource>"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of wn's data; what was read of another is forgotten, before and behind."""
    import wn

    monkeypatch.setattr(wn.config, "data_directory", tmp_path / "wn")
    for cached in (thesaurus._wordnet, thesaurus._of_wordnet):
        cached.cache_clear()
    yield tmp_path
    for cached in (thesaurus._wordnet, thesaurus._of_wordnet):
        cached.cache_clear()


def test_single_words_of_any_meaning_are_drawn_by_the_key(folder):
    import wn

    (folder / "small.xml").write_text(lexicon())
    wn.add(folder / "small.xml", progress_handler=None)
    assert synonyms("wordnet", "purchase") == ("acquire", "buy", "order")
    assert synonyms("wordnet", "table") == synonyms("wordnet", "unknown") == ()
    made = {
        AugmentText(CONFIG).random_map({"text": "Buy a table"}, np.random.default_rng(i))["text"] for i in range(20)
    }
    assert made == {"Purchase a table", "Acquire a table"}
    again = [changed(CONFIG, "Buy a table", np.random.default_rng(7)) for _ in range(2)]
    assert again[0] == again[1]


def test_a_wordnet_that_is_not_there_is_one_sentence_before_anything_is_learned(folder, monkeypatch):
    with pytest.raises(
        ValueError, match="wn has no English one on this machine; `python -m wn download oewn:2024`, or"
    ):
        AugmentText(CONFIG)
    monkeypatch.setitem(sys.modules, "wn", None)
    with pytest.raises(ValueError, match=r"takes wn; `pip install 'jaxcost\[wordnet\]'`, or use 'table'"):
        AugmentText(CONFIG)
    # Where no words are put in, none are asked for.
    AugmentText(dataclasses.replace(CONFIG, synonyms=0.0, swap=0.1))
    with pytest.raises(ValueError, match="data.augment.thesaurus is 'book'; use 'table' or 'wordnet'"):
        AugmentConfig(thesaurus="book")

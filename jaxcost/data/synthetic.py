"""Two synthetic datasets with labels, for machines without a network: made by a grammar, not written by people.

Importing this module registers the TFDS datasets `synthetic_customer_service` (what a customer wants, as in Banking77)
and `synthetic_financial_news` (what a sentence says of a company, as in the Financial PhraseBank). Figures on them are
figures on synthetic data, and say little of any other. It imports TFDS, so import it only where needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

_SLOT = re.compile(r"{(\w+)}")
_SIZES = {"train": 4000, "validation": 1000}
_SEEDS = {"train": 1, "validation": 2}

# ---- Customer service: the label is what the customer wants, whatever they say that they do not want ----

WANTED = {
    "cancel_order": ["cancel my order", "stop the order", "call off the purchase", "withdraw my {thing} order"],
    "change_address": ["change the delivery address", "send it to another address", "update where you ship it"],
    "charged_twice": ["report a double charge", "dispute a duplicate payment", "have the second charge removed"],
    "close_account": ["close my account", "delete my profile", "end my membership", "stop being a customer"],
    "delivery_status": ["track my package", "know where my {thing} is", "find out when my order arrives"],
    "lost_card": ["report a lost card", "block my stolen card", "freeze the card that i lost"],
    "opening_hours": ["know your opening hours", "find out when you are open", "visit the shop on {day}"],
    "refund": ["get a refund", "get my money back", "be reimbursed for the {thing}", "return the {thing} for cash"],
    "reset_password": ["reset my password", "get back into my account", "choose a new password", "log in again"],
    "speak_to_person": ["speak to a person", "talk to an agent", "reach a human", "be called back by someone"],
}
_SAID = {
    "cancel_order": ["i ordered the {thing} by mistake", "i do not need the {thing} any more, please stop it"],
    "change_address": ["i have moved, so please ship it to my new flat", "the address on my order is the old one"],
    "charged_twice": ["you took the money for the {thing} two times", "my statement shows the same payment twice"],
    "close_account": ["please remove me and all my data", "i am leaving you for good"],
    "delivery_status": ["my {thing} should have been here on {day}", "the parcel has not turned up yet"],
    "lost_card": ["my card is gone", "someone took my wallet with the card in it"],
    "opening_hours": ["are you open on {day}?", "until what time is the shop open on {day}?"],
    "refund": ["the {thing} broke and i want what i paid", "the {thing} is not as described, so pay me back"],
    "reset_password": ["it says that my password is wrong", "i am locked out of my account"],
    "speak_to_person": ["your bot does not understand me", "is there anybody real there?"],
}
_CUSTOMER = {
    "ask": [
        "i want to {wish}",
        "i would like to {wish}",
        "how do i {wish}?",
        "can you help me {wish}?",
        "is it possible to {wish}?",
        "i need to {wish}",
        "please let me {wish}",
        "what must i do to {wish}?",
    ],
    "hello": ["", "", "hi, ", "hello, ", "good morning, ", "hey there, ", "sorry to bother you, "],
    "bye": ["", "", ", thanks", ", please hurry", ", it is urgent", ", thank you very much", " today if you can"],
    "not": [
        "i do not want to {other}, {said}",
        "this is not about how to {other}, {said}",
        "before you ask, i will not {other}, {said}",
        "{said}, not to {other}",
    ],
    "hedge": ["maybe you can tell me: {said}", "i am not sure, but i think {said}", "i guess {said}"],
    "thing": ["phone", "jacket", "lamp", "laptop", "shoes", "book", "camera", "table", "headphones", "bag"],
    "day": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "a holiday"],
}

# ---- Financial news: the label follows from what moved, which way, and whether that is denied or only possible ----

SENTIMENTS = ("negative", "neutral", "positive")
_NEWS = {
    "firm": ["Nordwind", "Halden Oyj", "Castor Group", "Meridian Bank", "Ostra Steel", "Lumen Foods", "Tarn Energy"],
    "good": ["net sales", "operating profit", "revenue", "the order book", "market share", "the margin", "earnings"],
    "bad": ["costs", "net debt", "the operating loss", "customer complaints", "bad loans", "the backlog of repairs"],
    "rose": ["rose", "increased", "grew", "climbed", "went up", "jumped"],
    "rise": ["rise", "increase", "grow", "climb", "go up"],
    "fell": ["fell", "decreased", "shrank", "declined", "went down", "dropped"],
    "fall": ["fall", "decrease", "shrink", "decline", "go down"],
    "by": ["by {n} %", "to EUR {n} mn", "clearly", "in the {q} quarter"],
    "n": [str(n) for n in range(2, 60, 3)],
    "q": ["first", "second", "third", "fourth"],
    "tail": ["", "", ", the company said", " compared with a year earlier", ", according to the report", " in {place}"],
    "place": ["Finland", "Poland", "Asia", "the Baltics", "Germany", "the home market"],
    "no": ["did not {verb}", "failed to {verb}", "has not begun to {verb}", "did not {verb} as feared"],
    "may": ["may {verb}", "could {verb}", "might {verb}", "is expected to {verb}", "would perhaps {verb}"],
    "fact": [
        "{firm} will publish its report in the {q} quarter",
        "{firm} has {n} offices in {place}",
        "{firm} did not comment on {good}",
        "the shares of {firm} are listed in {place}",
        "{firm} named a new head of sales in {place}",
        "{good} of {firm} stayed the same as before",
    ],
}


def customer_message(draw: np.random.Generator) -> tuple[str, str]:
    """A synthetic message of a customer, and what it asks for."""
    labels = list(WANTED)
    label, other = (labels[i] for i in draw.choice(len(labels), 2, replace=False))
    grammar = _CUSTOMER | {"wish": WANTED[label], "other": WANTED[other]}
    said = "{ask}" if draw.random() < 0.6 else _choice(draw, _SAID[label])
    if draw.random() < 0.3:
        said = _choice(draw, grammar["not"]).replace("{said}", said)
    elif draw.random() < 0.2:
        said = _choice(draw, grammar["hedge"]).replace("{said}", said)
    text = _filled(draw, "{hello}" + said + "{bye}", grammar)
    return mistyped(draw, text, 0.02 if draw.random() < 0.5 else 0.0), label


def news_sentence(draw: np.random.Generator) -> tuple[str, str]:
    """A synthetic sentence of financial news, and what it says of the company: what is only possible is neutral."""
    kind = draw.choice(["plain", "denied", "hedged", "fact"], p=[0.45, 0.25, 0.15, 0.15])
    up, good = draw.random() < 0.5, draw.random() < 0.6
    metric, stem = ("{good}" if good else "{bad}"), ("{rise}" if up else "{fall}")
    if kind == "fact":
        return mistyped(draw, _filled(draw, "{fact}{tail}", _NEWS), 0.005), "neutral"
    if kind == "plain":
        said = f"{metric} of {{firm}} {'{rose}' if up else '{fell}'} {{by}}{{tail}}"
    else:
        verb = _choice(draw, _NEWS["no" if kind == "denied" else "may"]).replace("{verb}", stem)
        said = f"{metric} of {{firm}} {verb}{' {by}' if kind == 'hedged' else ''}{{tail}}"
    better = (up == good) != (kind == "denied")
    label = "neutral" if kind == "hedged" else ("positive" if better else "negative")
    return mistyped(draw, _filled(draw, said, _NEWS), 0.005), label


def mistyped(draw: np.random.Generator, text: str, rate: float) -> str:
    """Text in which letters are left out, doubled or changed round, each at `rate` / 3."""
    letters = list(text)
    i = 0
    while i < len(letters):
        if letters[i].isalpha() and draw.random() < rate:
            what = draw.integers(3)
            if what == 0:
                del letters[i]
                continue
            if what == 1:
                letters.insert(i, letters[i])
            elif i + 1 < len(letters) and letters[i + 1].isalpha():
                letters[i], letters[i + 1] = letters[i + 1], letters[i]
            i += 1
        i += 1
    return "".join(letters)


def _choice(draw: np.random.Generator, options: list[str]) -> str:
    return options[int(draw.integers(len(options)))]


def _filled(draw: np.random.Generator, text: str, grammar: dict[str, list[str]]) -> str:
    """Text with a choice in the place of each slot, and of those within it."""
    while found := _SLOT.search(text):
        text = text[: found.start()] + _choice(draw, grammar[found[1]]) + text[found.end() :]
    return text


class _Synthetic(tfds.core.GeneratorBasedBuilder):
    """A dataset that a grammar makes: `text` and `label`, the same on every machine; no text is in both splits."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS looks for download checksums beside this file; nothing is downloaded.
    labels: tuple[str, ...]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=list(self.labels))}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Synthetic: made by a grammar with paraphrases, typing errors, negation and hedging.",
            features=tfds.features.FeaturesDict(features),
            license="Apache-2.0",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        seen: set[str] = set()
        return {split: self._generate_examples(split, seen) for split in _SIZES}

    def _generate_examples(self, split: str, seen: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
        draw, made = np.random.default_rng(_SEEDS[split]), 0
        while made < _SIZES[split]:
            text, label = self.example(draw)
            if text not in seen:
                seen.add(text)
                yield made, {"text": text, "label": label}
                made += 1


class SyntheticCustomerService(_Synthetic):
    """Synthetic messages of customers with one of ten things that they want."""

    labels = tuple(WANTED)
    example = staticmethod(customer_message)


class SyntheticFinancialNews(_Synthetic):
    """Synthetic sentences about companies: negative, neutral or positive."""

    labels = SENTIMENTS
    example = staticmethod(news_sentence)

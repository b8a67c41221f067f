"""The frozen description of how a language model is asked for new texts with labels."""

from __future__ import annotations

import dataclasses
from typing import Literal

TEMPLATES = {
    "completions": "Texts with the label '{label}', each on a line of its own:\n{examples}\n",
    "chat": "Here are texts with the label '{label}', each on a line of its own:\n{examples}\n\nWrite one more text "
    "with this label that says something else in other words. Answer with the text alone, on one line.",
}
"""What is asked for by each of the API's ways, where the config says nothing."""


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """Who is asked for new texts, with which words, and which answers are kept.

    A key, where the address wants one, is read from the environment variable OPENAI_API_KEY and written nowhere.
    """

    url: str = "http://127.0.0.1:8000/v1"
    """Address of OpenAI's API; by default that of `scripts/serve.py` on this machine."""
    model: str = ""
    """Name of the model; the only one of the address if it is empty."""
    api: Literal["completions", "chat"] = "completions"
    """Prompts are gone on with, or are a user's turn, which takes a model with a chat template."""
    template: str = ""
    """The prompt, in which {label} stands for the label's name and {examples} for some of its texts, one on a line; one
    that shows both if it is empty."""
    prompts: tuple[tuple[str, str], ...] = ()
    """Labels with a template of their own, as pairs of a label's name and its template."""
    texts_per_label: int = 20
    """Texts that are asked for with each label; fewer are kept."""
    examples: int = 4
    """Texts of the train split in a prompt, drawn for each; with 0, {examples} is empty."""
    temperature: float = 1.0
    """Of the sampling."""
    max_tokens: int = 64
    """Tokens of an answer; one that is not done by then is thrown away."""
    stop: tuple[str, ...] = ("\n",)
    """Strings that end an answer."""
    least_words: int = 2
    """Words of a text that is kept, at least."""
    most_words: int = 100
    """Words of a text that is kept, at most."""
    likeness: float = 0.8
    """Likeness to a text of the train or the validation split, or to an earlier answer, from which on an answer is
    thrown away, as `SelectConfig` has it."""
    seed: int = 0
    """Of the examples in the prompts and of the sampling."""
    at_once: int = 4
    """Requests that wait for their answers together."""
    timeout_seconds: float = 120.0
    """How long an answer is waited for."""
    retries: int = 4
    """Times that a request is sent again, after growing pauses, where the address is busy, failing or away."""

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"synthesis.url is '{self.url}'; give an address such as http://127.0.0.1:8000/v1.")
        if self.api not in TEMPLATES:
            raise ValueError(f"synthesis.api is '{self.api}'; use 'completions' or 'chat'.")
        for name in ("texts_per_label", "max_tokens", "least_words", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"synthesis.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("examples", "temperature", "retries", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"synthesis.{name} is {getattr(self, name)}; it cannot be negative.")
        if self.most_words < self.least_words:
            raise ValueError(
                f"synthesis.most_words ({self.most_words}) is below synthesis.least_words ({self.least_words}); raise "
                "it."
            )
        if not 0.3 <= self.likeness <= 1:
            raise ValueError(f"synthesis.likeness is {self.likeness}; use a likeness from 0.3 to 1.")
        if not self.timeout_seconds > 0:
            raise ValueError(f"synthesis.timeout_seconds is {self.timeout_seconds}; it must be above 0.")

    def prompt(self, label: str, examples: tuple[str, ...]) -> str:
        """What is asked for a text with a label."""
        template = dict(self.prompts).get(label) or self.template or TEMPLATES[self.api]
        # One after the other would put a label into texts of the data that hold braces.
        shown = "\n".join(" ".join(text.split()) for text in examples)
        return shown.join(part.replace("{label}", label) for part in template.split("{examples}"))

    def check_labels(self, labels: tuple[str, ...]) -> None:
        """ValueError if a template is for a label that is none."""
        unknown = sorted({name for name, _ in self.prompts} - {*labels})
        if unknown:
            raise ValueError(
                f"synthesis.prompts has one for '{unknown[0]}', which is no label; the labels are {', '.join(labels)}."
            )

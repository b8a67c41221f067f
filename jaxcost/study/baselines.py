"""What little of a model would do: scores that the base's is set beside, on the very data that it is scored on."""

from __future__ import annotations

import numpy as np

from jaxcost.data import TokenStream
from jaxcost.evaluation.ngram import ngram_bits_per_byte
from jaxcost.session import Session

_ORDERS = {"unigram": 1, "trigram": 3, "five_gram": 5}


def measured(session: Session) -> dict[str, float]:
    """Scores in the unit of the objective's own: those of byte n-grams of a text, or of the frequencies of labels."""
    return _of_text(session) if isinstance(session.validation_stream, TokenStream) else _of_labels(session)


def _of_text(session: Session) -> dict[str, float]:
    train = session.tokenizer.symbols(session.train_stream.tokens)
    limit = session.experiment.evaluation.max_tokens
    held_out = session.validation_stream.tokens
    held_out = session.tokenizer.symbols(held_out[: limit + 1] if limit else held_out)
    return {name: ngram_bits_per_byte(train, held_out, order) for name, order in _ORDERS.items()}


def _of_labels(session: Session) -> dict[str, float]:
    """Every label counts once more than it was seen, so that one that training lacks has a probability too."""
    train, held_out = (split.label_counts() for split in (session.train_stream, session.validation_stream))
    likely = (train + 1) / (train.sum() + len(train))
    return {"label_frequencies": -float(np.sum(held_out * np.log(likely)) / held_out.sum())}

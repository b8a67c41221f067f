"""Models that answer once for a whole text: embeddings, labels and ranks. Shapes in names: B rows, T tokens."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.models import optional
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, logits
from jaxcost.serving.batches import Batched, BatchesConfig, padded_lengths

_BATCHES = BatchesConfig()


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, or two of them, as a model reads it."""

    ids: np.ndarray
    """int32 (T,)."""
    types: np.ndarray | None = None
    """int32 (T,): which of two texts each token is of; all 0 if not given."""


def answering(config: ModelConfig) -> ModelConfig:
    """The config with a head that answers once for a text.

    Where its own gives the hidden states of every token as embeddings, it is their mean, or the last one of a causal
    model, which alone has seen all of the text. ValueError if the head gives anything else.
    """
    head = config.head
    reads = config.source.of_tokens and head.outputs if config.encoder.num_layers else config.of_tokens
    if not reads or head.boxes or head.of_vocabulary:
        raise ValueError(
            "The model neither continues texts nor gives embeddings or labels of them; serve a decoder, or a model of "
            "tokens with model.head.embed or model.head.outputs."
        )
    if head.pooling != "none":
        return config
    if not head.embed:
        raise ValueError(
            "model.head.pooling is 'none', so that every token has labels of its own, which no address of the API "
            "gives; serve a model that labels whole texts."
        )
    pooling = "last" if config.causal else "mean"
    return dataclasses.replace(config, head=dataclasses.replace(head, pooling=pooling))


class Pooled(Batched[Text]):
    """The programs of a model that answers for texts."""

    def __init__(self, model: Transformer, params: weights.Params, config: BatchesConfig = _BATCHES):
        """Compiles everything; ValueError if the model does not answer for texts, or is shorter than asked for."""
        model = Transformer(answering(model.config), model.execution)
        limit = model.config.max_length - optional.virtual_tokens(params)
        lengths = padded_lengths(config.lengths, limit, "tokens that the model takes")
        self.vocab_size, self.typed = model.config.vocab_size, model.config.token_types > 1
        super().__init__(model, params, lengths, config)

    def _run(self, params, tokens_BT, valid_BT, types_BT=None):
        beside, encoder = {"valid_BT": valid_BT, "types_BT": types_BT}, self.model.config.encoder
        if encoder.num_layers:
            # What an encoder reads, its decoder reads too, a token later.
            beside |= {"source_BS": tokens_BT, "source_valid_BS": valid_BT}
            tokens_BT = jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)), constant_values=encoder.start)
        hidden_B1D, _ = self.model.apply({"params": params}, tokens_BT, **beside)
        return logits(self.model.config, params, hidden_B1D[:, 0])

    def _empty(self, rows: int, length: int) -> list[np.ndarray]:
        """Tokens, which of them are valid, and their types where there are any."""
        made = [np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)]
        # A row of padding alone would divide by nothing.
        made[1][:, 0] = True
        return [*made, np.zeros((rows, length), np.int32)] if self.typed else made

    def _put(self, arrays: list[np.ndarray], row: int, text: Text) -> None:
        tokens, valid, *types = arrays
        tokens[row, : len(text.ids)], valid[row, : len(text.ids)] = text.ids, True
        if types and text.types is not None:
            types[0][row, : len(text.ids)] = text.types

    def size(self, text: Text) -> int:
        return len(text.ids)

    tokens = size

    def check(self, text: Text) -> None:
        ids, most = text.ids, self.max_length
        if not len(ids):
            raise ValueError("A text is empty; give at least one token.")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"A text has ids outside 0 to {self.vocab_size - 1}; use the model's tokenizer.")
        if len(ids) > most:
            raise ValueError(f"A text has {len(ids)} tokens, more than the {most} that the model takes; shorten it.")

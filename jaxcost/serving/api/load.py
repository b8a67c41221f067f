"""From weights to a model that answers, checked before the first request."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxcost import weights
from jaxcost.data.tokenizers import Tokenizer
from jaxcost.models.transformer import Transformer
from jaxcost.serving.api.generation import TextModel
from jaxcost.serving.api.pooling import Labels, PooledModel
from jaxcost.serving.batches import Batcher, BatchesConfig
from jaxcost.serving.pooled import Pooled, Text
from jaxcost.serving.prefix import PrefixCache
from jaxcost.serving.sampling import GREEDY
from jaxcost.serving.scheduler import Scheduler
from jaxcost.serving.slots import Slots, SlotsConfig
from jaxcost.serving.speculative import Draft
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import SchedulerConfig

_SLOTS, _BATCHES, _SCHEDULER = SlotsConfig(), BatchesConfig(), SchedulerConfig()


def text_model(
    name: str,
    model: Transformer,
    params: weights.Params,
    tokenizer: Tokenizer,
    slots: SlotsConfig = _SLOTS,
    scheduler: SchedulerConfig = _SCHEDULER,
    prefix_cache_bytes: int = 0,
    adapters: Mapping[str, int] | None = None,
    draft: Draft | None = None,
) -> TextModel:
    """Compiles all that serving runs and starts it.

    Args:
      name: what clients call the model.
      model: what continues texts.
      params: its weights, of any kinds.
      tokenizer: of its texts.
      slots: how many requests run at once, and in what pieces.
      scheduler: what is taken on.
      prefix_cache_bytes: memory for prompts that were read; 0 keeps none.
      adapters: numbers of `weights.Adapters` in the weights by their names.
      draft: what proposes tokens, if anything does.

    Raises:
      ValueError: the model continues no texts, a size makes no sense, the draft does not fit, or the weights give no
        numbers.
    """
    made = Slots(model, params, slots, draft)
    made.admit(0, GREEDY, np.array([tokenizer.separator_id]))
    made.prefill(0, np.array([tokenizer.separator_id]), 0, 1)
    check_finite(name, np.asarray(made.state.logits[0]))
    prefixes = PrefixCache(made, prefix_cache_bytes) if prefix_cache_bytes else None
    vocabulary = Vocabulary(tokenizer)
    return TextModel(name, vocabulary, Scheduler(made, vocabulary.decode, scheduler, prefixes), adapters)


def pooled_model(
    name: str,
    model: Transformer,
    params: weights.Params,
    tokenizer: Tokenizer,
    batches: BatchesConfig = _BATCHES,
    scheduler: SchedulerConfig = _SCHEDULER,
    labels: Labels | None = None,
) -> PooledModel:
    """Compiles all that serving runs and starts it, for a model that answers once for a text.

    Args:
      name: what clients call the model.
      model: gives embeddings, labels or a rank.
      params: its weights, of any kinds.
      tokenizer: of its texts.
      batches: in what batches texts are read.
      scheduler: what is taken on.
      labels: what the outputs stand for, where that is known.

    Raises:
      ValueError: the model answers nothing for a text, a size makes no sense, or the weights give no numbers.
    """
    made = Pooled(model, params, batches)
    check_finite(name, made.run([Text(np.array([tokenizer.separator_id], np.int32))]))
    return PooledModel(name, Vocabulary(tokenizer), Batcher(made, scheduler), labels)


def check_finite(name: str, found: np.ndarray) -> None:
    """ValueError if outputs are no numbers."""
    if not np.all(np.isfinite(found)):
        raise ValueError(f"The weights of {name} give outputs that are no numbers; they are damaged, so name others.")

"""From weights to a model that answers, checked before the first request."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxcost import weights
from jaxcost.data.tokenizers import Tokenizer
from jaxcost.models.transformer import Transformer
from jaxcost.serving.api.generation import TextModel
from jaxcost.serving.prefix import PrefixCache
from jaxcost.serving.sampling import GREEDY
from jaxcost.serving.scheduler import Scheduler, SchedulerConfig
from jaxcost.serving.slots import Slots, SlotsConfig
from jaxcost.serving.vocabulary import Vocabulary

_SLOTS, _SCHEDULER = SlotsConfig(), SchedulerConfig()


def text_model(
    name: str,
    model: Transformer,
    params: weights.Params,
    tokenizer: Tokenizer,
    slots: SlotsConfig = _SLOTS,
    scheduler: SchedulerConfig = _SCHEDULER,
    prefix_cache_bytes: int = 0,
    adapters: Mapping[str, int] | None = None,
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

    Raises:
      ValueError: the model continues no texts, a size makes no sense, or the weights give no numbers.
    """
    made = Slots(model, params, slots)
    made.admit(0, GREEDY, np.array([tokenizer.separator_id]))
    made.prefill(0, np.array([tokenizer.separator_id]), 0, 1)
    if not np.all(np.isfinite(made.state.logits[0])):
        raise ValueError(f"The weights of {name} give logits that are no numbers; they are damaged, so name others.")
    prefixes = PrefixCache(made, prefix_cache_bytes) if prefix_cache_bytes else None
    vocabulary = Vocabulary(tokenizer)
    return TextModel(name, vocabulary, Scheduler(made, vocabulary.decode, scheduler, prefixes), adapters)

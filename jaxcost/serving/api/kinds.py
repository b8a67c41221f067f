"""From weights to a model that answers, for all but those that continue texts: its kind follows from its config."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from jaxcost import weights
from jaxcost.data.characters import read_characters
from jaxcost.data.pretrained import read_fields
from jaxcost.data.tokenizers import Tokenizer
from jaxcost.models.transformer import Transformer
from jaxcost.serving.api.generation import AnsweringModel
from jaxcost.serving.api.load import check_finite, pooled_model
from jaxcost.serving.api.pooling import ImageModel, Labels
from jaxcost.serving.api.served import Served
from jaxcost.serving.api.speech import DictatedModel, SpeechModel, SpelledModel
from jaxcost.serving.batches import Batcher, BatchesConfig
from jaxcost.serving.ctc import Heard
from jaxcost.serving.pictures import Pictures
from jaxcost.serving.sampling import GREEDY
from jaxcost.serving.slots import SlotsConfig
from jaxcost.serving.sources import SourceScheduler, SourceSlots, never
from jaxcost.serving.speech import read_instructions
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import SchedulerConfig

_SLOTS, _BATCHES, _SCHEDULER = SlotsConfig(), BatchesConfig(), SchedulerConfig()
_INSTRUCTIONS = (4, 32)
"""Sizes of the pieces in which a decoder of speech reads what it is told, and the text before a recording."""


def model_of_kind(
    name: str,
    model: Transformer,
    params: weights.Params,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    labels: Labels | None = None,
    slots: SlotsConfig = _SLOTS,
    batches: BatchesConfig = _BATCHES,
    scheduler: SchedulerConfig = _SCHEDULER,
) -> Served:
    """Compiles all that serving runs and starts it, for a model that does not continue texts.

    Args:
      name: what clients call the model.
      model: answers to texts or recordings by an encoder and a decoder, or once for a text, an image or a recording.
      params: its weights, of any kinds.
      tokenizer: of its texts.
      folder: holds what a checkpoint of transformers came with, for models that hear.
      labels: what the outputs stand for, where that is known.
      slots: how many requests of a decoder run at once.
      batches: in what batches a model that answers once reads.
      scheduler: what is taken on.

    Raises:
      ValueError: the model does nothing of this, a size makes no sense, or the weights give no numbers.
    """
    config = model.config
    if config.encoder.num_layers and config.generates:
        if config.source.images.patch:
            raise ValueError("The model answers to images, which the server does not take; use it from the library.")
        if config.source.of_tokens:
            return answering_model(name, model, params, tokenizer, slots, scheduler, batches.lengths)
        return _dictated(name, model, params, tokenizer, folder, slots, scheduler)
    if config.images.patch and not config.encoder.num_layers:
        return image_model(name, model, params, tokenizer, batches, scheduler, labels)
    if config.audio.channels == 1 and config.head.outputs and config.head.pooling == "none":
        return _spelled(name, model, params, tokenizer, folder, batches, scheduler)
    return pooled_model(name, model, params, tokenizer, batches, scheduler, labels)


def answering_model(
    name: str,
    model: Transformer,
    params: weights.Params,
    tokenizer: Tokenizer,
    slots: SlotsConfig = _SLOTS,
    scheduler: SchedulerConfig = _SCHEDULER,
    lengths: tuple[int, ...] = (),
) -> AnsweringModel:
    """A model whose encoder reads texts, padded to one of `lengths`, and whose decoder answers; see `model_of_kind`."""
    made = SourceSlots(model, params, slots, lengths=lengths)
    _check_answers(name, made, np.array([tokenizer.separator_id], np.int32))
    vocabulary = Vocabulary(tokenizer)
    return AnsweringModel(name, vocabulary, SourceScheduler(made, vocabulary.decode, scheduler))


def image_model(
    name: str,
    model: Transformer,
    params: weights.Params,
    tokenizer: Tokenizer,
    batches: BatchesConfig = _BATCHES,
    scheduler: SchedulerConfig = _SCHEDULER,
    labels: Labels | None = None,
) -> ImageModel:
    """A model that labels images; see `model_of_kind`."""
    made = Pictures(model, params, batches)
    check_finite(name, made.run([np.zeros(made.shape, np.float32)]))
    return ImageModel(name, Vocabulary(tokenizer), Batcher(made, scheduler), labels)


def _dictated(name, model, params, tokenizer, folder, slots, scheduler) -> SpeechModel:
    _check_packages()
    vocab_size = model.config.vocab_size
    told = read_instructions(folder, model.config.encoder.start, vocab_size)
    # Half of what a slot holds may be the text before a recording.
    length = slots.max_length or model.config.max_length
    least = 2 * len(told.prompt(next(iter(told.languages), None), translate=False)) + 2
    if length < least:
        raise ValueError(
            f"{length} tokens leave no room for answers behind what the decoder is told; set engine.max_length to at "
            f"least {least}."
        )
    params = never(params, told.never, vocab_size)
    made = SourceSlots(model, params, slots, prompt_tokens=_INSTRUCTIONS, not_first=told.not_first)
    _check_answers(name, made, np.zeros(1, np.float32))
    vocabulary = Vocabulary(tokenizer)
    return DictatedModel(name, vocabulary, SourceScheduler(made, vocabulary.decode, scheduler), told)


def _spelled(name, model, params, tokenizer, folder, batches, scheduler) -> SpeechModel:
    _check_packages()
    characters = read_characters(folder, model.config.head.outputs)
    normalized = read_fields(folder, "preprocessor_config.json").get("do_normalize", True)
    made = Heard(model, params, batches, blank=characters.blank, normalized=bool(normalized))
    return SpelledModel(name, Vocabulary(tokenizer), Batcher(made, scheduler), characters)


def _check_packages() -> None:
    if not all(map(importlib.util.find_spec, ("python_multipart", "soundfile"))):
        raise ValueError("Serving a model that hears needs further packages; `pip install 'jaxcost[serve]'`.")


def _check_answers(name: str, slots: SourceSlots, source: np.ndarray) -> None:
    start = np.array([slots.model.config.encoder.start], np.int32)
    slots.admit(0, GREEDY, start)
    slots.read(0, source)
    slots.prefill(0, start, 0, 1)
    check_finite(name, np.asarray(slots.state.logits[0]))

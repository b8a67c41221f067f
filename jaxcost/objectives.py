"""What an experiment learns, by its `data.objective`: which model that takes, its data, its batches, its score."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import grain
from jax.sharding import Mesh

from jaxcost.data import DataConfig, Tokenizer, TokenStream, tokenize_split, train_batches, validation_batches
from jaxcost.data.augmentation.images import AugmentImage, MixRows
from jaxcost.data.augmentation.text import AugmentText
from jaxcost.data.buckets import cut, token_counts
from jaxcost.data.examples import Examples, Row, answer_row, label_row, open_examples, report, source_row
from jaxcost.data.images import image_row, resized
from jaxcost.data.masking import Masking
from jaxcost.data.pipeline import batches_in_order
from jaxcost.evaluation.labels import Labeller
from jaxcost.evaluation.masked import MaskedScorer
from jaxcost.evaluation.regression import Regressor
from jaxcost.evaluation.score import Scorer
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer

Split = TokenStream | Examples


def check_model(objective: str, model: ModelConfig, of_images: bool = False) -> None:
    """ValueError, in one sentence, if a model cannot learn the objective, of images or of texts."""
    head, alone = model.head, model.of_tokens and not model.encoder.num_layers
    # A text is read by a model that has no encoder, or by its encoder.
    reads = alone or (model.encoder.num_layers > 0 and model.source.of_tokens)
    answers = objective == "answers" and model.generates and reads
    if objective in ("next_token", "answers") and not (model.language_model or answers):
        raise ValueError(
            "Training and scoring are on the next token of a text alone, which takes a causal model with logits of "
            "the vocabulary and no encoder; set model.causal, and leave model.head and model.encoder by default."
        )
    if objective == "masked_tokens" and (model.causal or not head.of_vocabulary or not alone):
        raise ValueError(
            "data.objective is 'masked_tokens', which takes an encoder with logits of the vocabulary; turn "
            "model.causal off, and leave model.head.outputs and model.encoder by default."
        )
    if objective == "labels":
        wanted = model.images.patch > 0 and not model.encoder.num_layers if of_images else reads
        if not head.outputs or head.pooling == "none" or head.boxes or not wanted:
            kind = "of images, by model.images," if of_images else "of tokens"
            raise ValueError(
                f"data.objective is 'labels', which takes a model {kind} that gives one answer for each; set "
                "model.head.outputs to the number of labels, and model.head.pooling to 'first', 'last' or 'mean'."
            )
    if of_images and model.images.channels not in (1, 3):
        raise ValueError(
            f"model.images.channels is {model.images.channels}; image files have 1 or 3, so set it to one."
        )
    if objective == "regression" and (head.outputs != 1 or head.pooling == "none" or not reads):
        raise ValueError(
            "data.objective is 'regression', which takes a model of tokens that gives one number for each text; set "
            "model.head.outputs to 1, and model.head.pooling to 'first', 'last' or 'mean'."
        )


def least_vocabulary(objective: str, tokenizer: Tokenizer) -> int:
    """Rows of the embedding table that the tokens of an objective need: those of the tokenizer, and of a mask."""
    size = tokenizer.vocab_size
    return max(size, tokenizer.mask_id + 1) if objective == "masked_tokens" else size


def chosen_vocabulary(objective: str, tokenizer: Tokenizer) -> int:
    """Rows of the embedding table where the config leaves them to the tokenizer: a multiple of 128."""
    return -(-least_vocabulary(objective, tokenizer) // 128) * 128


def open_split(config: DataConfig, split: str, tokenizer: Tokenizer, model: ModelConfig) -> Split:
    """A split as what is learned of it: tokens, or examples.

    Raises:
      ValueError: the split cannot be opened, or has more labels than the model.
    """
    if not config.of_examples:
        return tokenize_split(config, split, tokenizer)
    examples = open_examples(config, split)
    if len(examples.labels) > model.head.outputs and config.objective == "labels":
        raise ValueError(
            f"The data have {len(examples.labels)} labels, more than model.head.outputs ({model.head.outputs}); "
            "raise it."
        )
    return examples


def learned_batches(
    config: DataConfig, split: Split, tokenizer: Tokenizer, model: ModelConfig, **part: Any
) -> grain.DatasetIterator:
    """An endless iterator of batches to learn from; `part` says which rows, as `train_batches` has it."""
    if isinstance(split, TokenStream):
        hide = Masking.of(config.masked_fraction, tokenizer) if config.objective == "masked_tokens" else None
        return train_batches(config, split.tokens, prepare=hide, **part)
    row, change = _row(config, tokenizer, model), _change(config, model)
    if config.buckets:
        part |= {"lengths": token_counts(split, tokenizer), "finish": lambda batch, _: cut(batch, config.lengths)}
    elif config.augment.images.mixes:
        part |= {"finish": MixRows(config.augment.images, model.head.outputs).random_map}
    return train_batches(config, split, prepare=lambda example, rng: row(change(example, rng)), **part)


def make_scorer(
    config: DataConfig, split: Split, tokenizer: Tokenizer, model: Transformer, mesh: Mesh, max_tokens: int | None
) -> Callable[[Any], Any]:
    """What scores weights on a split: a function from them to a dataclass of figures."""
    batches = scored_batches(config, split, tokenizer, model.config, max_tokens)
    if config.objective == "masked_tokens":
        return MaskedScorer(model, batches, mesh)
    if config.objective == "labels":
        return Labeller(model, batches, mesh)
    if config.objective == "regression":
        return Regressor(model, batches, mesh)
    return Scorer(model, batches, tokenizer.token_bytes, mesh)


def scored_batches(
    config: DataConfig, split: Split, tokenizer: Tokenizer, model: ModelConfig, max_tokens: int | None
) -> list[dict[str, Any]]:
    """The batches that weights are scored on, in the order of the split."""
    if isinstance(split, TokenStream):
        batches = validation_batches(config, split.tokens, max_tokens)
        if config.objective == "masked_tokens":
            batches = Masking.of(config.masked_fraction, tokenizer).hidden(batches)
        return list(batches)
    row = _row(config, tokenizer, model)
    return list(batches_in_order([row(example) for example in split], config.batch_size))


def data_report(split: Split, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a person should know of a split: how many records were left out, and how many texts are cut."""
    if isinstance(split, TokenStream):
        skipped = {"skipped_records": len(split.skipped), "skipped": list(split.skipped[:5])} if split.skipped else {}
        return skipped | dict(split.left_out)
    return report(split, tokenizer)


def label_rows(config: DataConfig, tokenizer: Tokenizer, model: ModelConfig) -> Callable[[dict[str, Any]], Row]:
    """What makes the row of a text and its label, or number, that a model reads."""
    start = model.encoder.start if model.encoder.num_layers else None
    return functools.partial(label_row, tokenizer, config.sequence_length, start)


def _change(config: DataConfig, model: ModelConfig) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    """What changes an example before it is learned from, with a generator."""
    if not config.augment.active:
        return lambda example, _: example
    if config.of_images:
        change, size = AugmentImage(config.augment.images), _image_size(model)
        return lambda example, rng: change.random_map(resized(size, example), rng)
    return AugmentText(config.augment).random_map


def _image_size(model: ModelConfig) -> tuple[int, int, int]:
    return model.images.height, model.images.width, model.images.channels


def _row(config: DataConfig, tokenizer: Tokenizer, model: ModelConfig) -> Callable[[dict[str, Any]], Row]:
    if config.of_images:
        return functools.partial(image_row, _image_size(model))
    if config.one_answer:
        return label_rows(config, tokenizer, model)
    if model.encoder.num_layers:
        return functools.partial(source_row, tokenizer, config.sequence_length, model.encoder.start)
    return functools.partial(answer_row, tokenizer, config.sequence_length)

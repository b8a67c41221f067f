"""Token arrays to batches: an endless shuffled stream to learn from, a fixed list of batches to score on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcost.data.buckets import Buckets
from jaxcost.data.config import DataConfig
from jaxcost.data.packing import Rows, Windows
from jaxcost.data.workers import WorkerBatches

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
"""`inputs` and `targets`, int32 (B, S), and `mask`, float32 (B, S), 1 where the target counts; where documents are kept
apart also `segments`, int32 (B, S)."""

RECORDS = "records"
"""The name, beside the arrays of a batch, of the numbers of its windows."""

_PREFETCHED_BATCHES = 4


def train_batches(
    config: DataConfig,
    tokens: np.ndarray | Sequence[Any],
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    numbered: bool = False,
    prepare: Callable[[Any, np.random.Generator], dict[str, np.ndarray]] | None = None,
    finish: Callable[[Batch, np.random.Generator], Batch] | None = None,
    lengths: np.ndarray | None = None,
) -> grain.DatasetIterator[Batch] | WorkerBatches:
    """Iterates for ever over shuffled windows of the tokens, or over shuffled examples.

    The order is drawn from `config.shuffle_seed` and anew every epoch; an epoch holds every full window once, and a
    batch may span two epochs. A thread, or `config.workers` processes, prepare a few batches ahead, but `get_state()`
    is the position after the batch last handed out: a small dict of plain integers, fit for JSON, from which
    `set_state()` goes on with exactly the batches that would have come.

    Args:
      config: sequence length (S), batch size (B) and seed.
      tokens: integers (N,), such as `TokenStream.tokens`, or examples by index, which `prepare` makes rows of.
      start_step: batches to pass over, at no cost; the same as the state after that many batches.
      rows: the rows of each batch that are read, in ascending order, as a process of several reads its part; all by
        default. The batches of the job, and their positions, are the same however many processes share them.
      numbered: beside the arrays, give the numbers of the windows in the split as `records`, int64 (B,), which are for
        a log and not for a model.
      prepare: makes of each window or example the row that is learned from, with a generator of its own, drawn anew
        every epoch; what it does depends on nothing else.
      finish: makes of each batch the one that is learned from, with a generator of its own. Each process then prepares
        whole batches, of which it gives its rows.
      lengths: tokens of each example, (N,), for batches of like lengths; of any if they are not given.

    Returns:
      A Grain iterator of batches, or one like it: `inputs` and `targets`, int32 (B, S), `mask`, float32 (B, S), all
      ones; or of what `prepare` makes.

    Raises:
      ValueError: the tokens don't fill one batch, or `start_step` is negative.
    """
    import grain

    windows = _sequences(config, tokens)
    if len(windows) < config.batch_size:
        made = (
            f"tokens make {len(windows)} sequences of {config.sequence_length},"
            if windows is not tokens
            else "examples are"
        )
        raise ValueError(
            f"The {len(tokens)} training {made} fewer than one batch of {config.batch_size}; lower data.batch_size or "
            "data.sequence_length, or use more data."
        )
    if start_step < 0:
        raise ValueError(f"start_step is {start_step}; give the number of batches already used, 0 to begin.")
    order = grain.MapDataset.range(len(windows)).seed(config.shuffle_seed).shuffle().repeat()
    # In the same order, as it is shuffled by the same seed; what is drawn for a row depends on its place in it alone.
    shuffled = grain.MapDataset.source(windows).seed(config.shuffle_seed).shuffle().repeat()
    shuffled = shuffled if prepare is None else shuffled.random_map(prepare)
    rows = np.arange(config.batch_size) if rows is None else np.asarray(rows)
    buckets = None if lengths is None else Buckets(order, lengths, config.batch_size, config.shuffle_seed)

    def batch(step: int) -> Batch:
        whole = step * config.batch_size + np.arange(config.batch_size) if buckets is None else buckets.places(step)
        own = whole[rows]
        made = _stacked([shuffled[int(place)] for place in (own if finish is None else whole)])
        if finish is not None:
            finished = finish(made, np.random.default_rng((config.shuffle_seed, step)))
            made = {name: array[rows] for name, array in finished.items()}
        return made | {RECORDS: np.asarray([order[int(place)] for place in own])} if numbered else made

    steps = sys.maxsize // config.batch_size
    if config.workers:
        return WorkerBatches(batch, steps, config.workers, start_step)
    batches = grain.MapDataset.range(steps).map(batch)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
    iterator = iter(batches.to_iter_dataset(options))
    if start_step:
        grain.experimental.set_next_index(iterator, start_step)
    return iterator


def validation_batches(config: DataConfig, tokens: np.ndarray, max_tokens: int | None = None) -> Iterator[Batch]:
    """Iterates over the first windows of the tokens in order, the same every time.

    Every target among `tokens[1 : max_tokens + 1]` counts exactly once; all batches have the same shapes, and what
    is left of the last one has mask 0.

    Args:
      config: sequence length (S) and batch size (B).
      tokens: integers (N,), such as `TokenStream.tokens`.
      max_tokens: targets to score at most; None for all.

    Returns:
      An iterator of batches: `inputs` and `targets`, int32 (B, S), `mask`, float32 (B, S).

    Raises:
      ValueError: there is no target to score.
    """
    if max_tokens is not None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; give at least 1, or None to score the whole split.")
        tokens = tokens[: max_tokens + 1]
    windows = _sequences(config, tokens, keep_last=True)
    if not len(windows):
        raise ValueError(f"The validation split holds {len(tokens)} tokens, none to predict; use a larger one.")
    return batches_in_order(windows, config.batch_size)


def batches_in_order(windows: Sequence[Batch], batch_size: int) -> Iterator[Batch]:
    """Yields batches of rows in their order; what is left of the last one is zeros."""
    for start in range(0, len(windows), batch_size):
        rows = [windows[i] for i in range(start, min(start + batch_size, len(windows)))]
        batch = {name: np.zeros((batch_size, *array.shape), array.dtype) for name, array in rows[0].items()}
        for name, array in batch.items():
            array[: len(rows)] = [row[name] for row in rows]
        yield batch


def _stacked(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _sequences(config: DataConfig, tokens: np.ndarray | Sequence[Any], keep_last: bool = False) -> Sequence[Any]:
    """The sequences of a token array; the token that begins it begins every document. Examples are sequences."""
    if not isinstance(tokens, np.ndarray):
        return tokens
    if config.packing == "first_fit":
        return Rows(tokens, config.sequence_length)
    separator = int(tokens[0]) if config.separate_documents and len(tokens) else None
    return Windows(tokens, config.sequence_length, keep_last, separator)

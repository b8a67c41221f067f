"""Batches from worker processes: those of one process, for any number of them, resumed anywhere; and how they end."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from labels import write_folder

from jaxcost.data import DataConfig, train_batches
from jaxcost.data.augmentation import AugmentConfig
from jaxcost.data.examples import open_examples
from jaxcost.data.packing import Rows, Windows
from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.models.config import ModelConfig
from jaxcost.objectives import learned_batches

CONFIG = DataConfig(sequence_length=8, batch_size=4)
TOKENS = np.arange(84, dtype=np.uint16)  # ten sequences


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_a_position_is_the_same_with_and_without_workers_and_starts_none():
    before = len(multiprocessing.active_children())
    alone = train_batches(CONFIG, TOKENS, start_step=3)
    workers = train_batches(dataclasses.replace(CONFIG, workers=2), TOKENS, start_step=3)
    assert workers.get_state() == alone.get_state() == {"next_index": 3}
    workers.set_state({"next_index": 5})
    assert workers.get_state() == {"next_index": 5} and len(multiprocessing.active_children()) == before
    workers.close()
    with pytest.raises(ValueError, match="data.workers is -1; it cannot be negative"):
        dataclasses.replace(CONFIG, workers=-1)


@pytest.mark.parametrize("kind", [Windows, Rows])
def test_a_mapped_array_is_not_copied_to_a_worker(tmp_path, kind):
    np.save(tmp_path / "tokens.npy", np.arange(100_000, dtype=np.uint16))
    tokens = np.lib.format.open_memmap(tmp_path / "tokens.npy", mode="r")
    for array, small in ((tokens, True), (tokens[8:], False), (np.asarray(tokens), False)):
        sequences = kind(array, 50_000)
        sent = pickle.dumps(sequences)
        assert (len(sent) < 50_000) == small
        assert_equal([sequences[0]], [pickle.loads(sent)[0]])


@pytest.mark.slow
def test_batches_are_the_same_for_any_number_of_workers_and_resumed_within_an_epoch(tmp_path):
    examples = write_folder(tmp_path)
    config = DataConfig(
        sources=(str(examples),),
        objective="labels",
        sequence_length=16,
        batch_size=16,
        cache_dir=str(tmp_path / "cache"),
        augment=AugmentConfig(swap=0.5, keyboard=0.2),
    )
    split = open_examples(config, "train")

    def batches(workers, **part):
        asked = dataclasses.replace(config, workers=workers)
        return learned_batches(asked, split, ByteTokenizer(), ModelConfig(), **part)

    whole = take(batches(0, numbered=True), 20)  # more than two epochs of 120 texts
    before = set(multiprocessing.active_children())
    iterator = batches(2, numbered=True)
    assert_equal(take(iterator, 11), whole[:11])
    assert len(set(multiprocessing.active_children()) - before) == 2
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    assert set(multiprocessing.active_children()) == before
    # Three workers go on where two have ended, with what one host of two reads.
    resumed = batches(3, rows=range(8, 16), numbered=True)
    resumed.set_state(state)
    assert_equal(take(resumed, 4), [{name: a[8:] for name, a in batch.items()} for batch in whole[11:15]])
    resumed.close()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_they_work_for(tmp_path, sent):
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, time\n"
        "import numpy as np\n"
        "from jaxcost.data import DataConfig, train_batches\n"
        "if __name__ == '__main__':\n"
        "    batches = train_batches(DataConfig(sequence_length=8, batch_size=4, workers=2), np.arange(84))\n"
        "    next(batches)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    where = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=where)
    workers = list(map(int, process.stdout.readline().split()))
    assert len(workers) == 2
    process.send_signal(sent)
    process.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)

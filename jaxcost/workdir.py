"""The folder of a training: what runs in it, and that one job at a time does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path

from jaxcost import hosts, serialization
from jaxcost.config import Experiment
from jaxcost.data import Tokenizer
from jaxcost.data.files import atomic_write

DESCRIPTION = "experiment.json"
TOKENIZER = "tokenizer.json"


@contextlib.contextmanager
def alone_in(directory: Path, doing: str = "training") -> Iterator[None]:
    """Holds a folder for this job; ValueError if another holds it, or if it is no folder."""
    if re.match(r"[a-z0-9]+:/", str(directory)):
        raise ValueError(f"{directory} is an address and no folder; mount the bucket as files (gcsfuse) and name that.")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a folder as --workdir.")
    directory.mkdir(parents=True, exist_ok=True)
    if not hosts.is_first():
        yield
        return
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"Another process is {doing} in {directory}; wait for it, or choose another --workdir."
            ) from None
        yield


def claim(directory: Path, experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Writes down what runs in a folder, or checks that the same ran there before: ValueError if something else did."""
    path = directory / DESCRIPTION
    hosts.meet("before claiming a folder")
    if path.exists():
        before = read_experiment(directory)
        changed = serialization.differences(before.trained_part(), experiment.trained_part())
        if changed:
            raise ValueError(
                f"{directory} holds a run with another {', '.join(changed)}; "
                "choose another --workdir, or give the same settings to go on with that run."
            )
        return
    hosts.meet("before describing a folder")
    if not hosts.is_first():
        return
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / TOKENIZER)
    # The description comes last: a folder without one counts as empty.
    with atomic_write(path) as file:
        file.write(json.dumps(serialization.to_json(experiment), indent=1).encode())


def read_experiment(directory: Path) -> Experiment:
    """The experiment that a folder holds a run of; ValueError if there is none."""
    path = Path(directory) / DESCRIPTION
    if not path.is_file():
        if (path.parent / "config.json").is_file():
            raise ValueError(f"{directory} is a checkpoint of transformers; convert it first, with scripts/convert.py.")
        raise ValueError(f"{directory} holds no run: {DESCRIPTION} is missing. Give the --workdir of a training.")
    try:
        return serialization.from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or train again in another folder.") from None

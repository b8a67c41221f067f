"""Checkpoints of a run: written in the background, whole or not at all, checked when they are read."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from jaxcost.hosts import LostHostError
from jaxcost.training.config import CheckpointConfig
from jaxcost.weights import path_name


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says what to do."""


class Checkpoints:
    """The checkpoints in one directory, one numbered folder a step.

    Each holds a tree of arrays and a dict for JSON (data position, ledger totals, checksums). Orbax writes it under a
    temporary name and renames it when it is whole, so a killed run leaves nothing that looks like a checkpoint.
    """

    def __init__(self, directory: Path, config: CheckpointConfig | None = None):
        """Opens the directory; it is made at the first save. Without a config, for reading alone."""
        self._directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep if config else None, create=config is not None, read_only=config is None
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, LostHostError):
            # What waits for the others would wait for ever.
            return
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self._thread.shutdown()
            self._manager.close()

    def latest(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, metadata: dict[str, Any], donated: bool = True) -> None:
        """Starts writing. CheckpointError if an earlier write failed.

        With `donated`, the arrays may be donated as soon as this returns: what is written is a copy in the host's
        memory, and the trainer waits for its start alone. Without, they are to be left as they are until `wait`.

        Where processes share a job, the trainer waits for the whole copy, which Orbax makes then: what it has them
        agree on may be programs of the devices, which every process must start in the same order as the steps.
        """
        if jax.process_count() > 1:
            self._guarded(lambda: self._write(step, tree, metadata, _start_sums(tree)))
            return
        self.wait()
        on_host = jax.default_backend() == "cpu"
        written = tree
        if donated:
            places = jax.tree.map(lambda x: x.sharding if on_host else x.sharding.with_memory_kind("pinned_host"), tree)
            written = jax.device_put(tree, places, may_alias=False)
        # Devices sum what they hold before the next step may change it; a CPU sums the copy beside that step.
        sums = None if on_host else _start_sums(tree)

        def write():
            self._write(step, written, metadata, sums or _start_sums(written))
            self._manager.wait_until_finished()

        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Returns when everything is on disk. CheckpointError if a write failed."""
        writing, self._writing = self._writing, None
        self._guarded(self._manager.wait_until_finished if writing is None else writing.result)

    def _write(self, step, tree, metadata, sums):
        items = ocp.args.Composite(
            tree=ocp.args.StandardSave(serialization.to_state_dict(tree)),
            metadata=ocp.args.JsonSave(metadata | {"checksums": _finish_sums(sums)}),
        )
        self._manager.save(step, args=items)

    def metadata(self, step: int) -> dict[str, Any]:
        """The dict saved with a checkpoint."""
        items = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        return self._read(step, lambda: self._manager.restore(step, args=items)["metadata"])

    def restore(self, step: int, target: Any, part: bool = False) -> tuple[Any, dict[str, Any]]:
        """The tree, in the structure, dtypes and shardings of `target` (ShapeDtypeStructs), and its metadata.

        With `part`, the checkpoint may hold more than the target, which is then not read.

        CheckpointError if it is damaged, or not of this structure; the other checkpoints are left as they are.
        """
        metadata = self.metadata(step)
        wanted = serialization.to_state_dict(target)
        how = ocp.args.StandardRestore(wanted)
        if part:
            places = ocp.checkpoint_utils.construct_restore_args(wanted)
            how = ocp.args.PyTreeRestore(wanted, restore_args=places, partial_restore=True)
        state = self._read(step, lambda: self._manager.restore(step, args=ocp.args.Composite(tree=how))["tree"])
        tree = serialization.from_state_dict(target, state)
        found, saved = _finish_sums(_start_sums(tree)), metadata.get("checksums", {})
        wrong = [name for name in found if found[name] != saved.get(name)]
        if wrong:
            raise CheckpointError(self._damaged(step, f"the checksum of {wrong[0]} is wrong"))
        return tree, metadata

    def _guarded(self, write):
        try:
            write()
        except Exception as error:
            last = self._manager.latest_step()
            kept = "there is no earlier one" if last is None else f"the last good checkpoint, step {last}, is intact"
            raise CheckpointError(
                f"A checkpoint could not be written to {self._directory} ({_first_line(error)}); {kept}. "
                "Free some space or choose another --workdir, and run the same command again."
            ) from error

    def _read(self, step, read):
        try:
            return read()
        except Exception as error:
            raise CheckpointError(self._damaged(step, _first_line(error))) from error

    def _damaged(self, step, why):
        earlier = [other for other in self._manager.all_steps() if other < step]
        then = f"to go on from step {max(earlier)}" if earlier else "to start again"
        return f"The checkpoint {self._directory / str(step)} cannot be read ({why}); remove that folder {then}."


_LARGE_BYTES = 2**26


def _start_sums(tree: Any) -> dict[str, Any]:
    """For every array the sum of its bytes' 32-bit words, modulo 2**32: what a flipped bit on a disk would change.

    They are on the devices, started and not waited for; of a large stack there is one a layer.
    """
    named = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    large = {name: x for name, x in named.items() if x.nbytes > _LARGE_BYTES and x.ndim > 2}
    sums = _word_sums({name: x for name, x in named.items() if name not in large})
    # XLA on a CPU writes out the 32-bit words that it sums, twice what is stored in 16 bits: of one layer at a time.
    return sums | {name: [_layer_word_sum(x, i) for i in range(x.shape[0])] for name, x in large.items()}


def _finish_sums(sums: dict[str, Any]) -> dict[str, int]:
    """The sums that were started, as numbers."""
    found = jax.device_get(sums)
    return {name: sum(map(int, jax.tree.leaves(found[name]))) % 2**32 for name in sorted(found)}


@jax.jit
def _word_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _word_sum(x) for name, x in arrays.items()}


@jax.jit
def _layer_word_sum(x: jax.Array, layer: int) -> jax.Array:
    return _word_sum(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False))


def _word_sum(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[np.dtype(x.dtype).itemsize]
    whole_bytes = x.dtype != jnp.bool_ and jax.dtypes.itemsize_bits(x.dtype) >= 8
    x = jax.lax.bitcast_convert_type(x, unsigned) if whole_bytes else x.astype(unsigned)
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # The store's messages nest: what was asked for comes first, what the system said comes last.
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-170:]}"

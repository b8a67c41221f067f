"""Sparse weights on disk: masks as bits, kept values alone, and the same weights when they are read again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost.study.export import export, read_export
from jaxcost.transforms import Gradual, chain, lora, prune, quantize, rule
from jaxcost.weights import materialize

EVERY = (rule("."),)


def read(path):
    with np.load(path) as file:
        return {name: file[name] for name in file}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_what_is_read_is_what_was_written(tmp_path, pattern, dtype):
    w = jax.random.normal(jax.random.key(0), (2, 12, 5))
    transform = prune(pattern=pattern, rules=EVERY)
    if dtype == jnp.int8:
        transform = chain(transform, quantize(rules=EVERY))
    got = transform({"layers": {"kernel": w}})["layers"]["kernel"]
    written = export({"layers": {"kernel": got}}, tmp_path / "weights.npz")
    assert written == (tmp_path / "weights.npz").stat().st_size
    back = read_export(tmp_path / "weights.npz", jax.eval_shape(lambda: {"layers": {"kernel": got}}))
    found = back["layers"]["kernel"]
    np.testing.assert_array_equal(found.mask, got.mask)
    values, expected = (w.weight.codes if dtype == jnp.int8 else w.weight for w in (found, got))
    np.testing.assert_array_equal(values, jnp.where(got.mask, expected, 0))
    assert values.dtype == dtype
    if dtype == jnp.int8:
        np.testing.assert_array_equal(found.weight.scale, got.weight.scale)


def test_bytes_are_those_of_the_kept_values_and_a_bit_for_each_entry(tmp_path):
    w = {"layers": {"kernel": jax.random.normal(jax.random.key(0), (2, 64, 64))}}
    dense = export(w, tmp_path / "dense.npz")
    sparse = export(prune(sparsity=0.75, rules=EVERY)(w), tmp_path / "sparse.npz")
    assert sparse < 2 * 64 * 64 * (4 * 0.25 + 1 / 8) + 1000
    assert sparse < 0.35 * dense


def test_learned_scores_stay_behind(tmp_path):
    w = {"layers": {"kernel": jnp.ones((2, 4, 5))}}
    scored = prune(method="movement", gradual=Gradual(end_step=3), rules=EVERY)(w)
    export(scored, tmp_path / "weights.npz")
    assert set(read(tmp_path / "weights.npz")) == {"layers/kernel/weight", "layers/kernel/mask", "manifest"}


@pytest.mark.parametrize("finish", [(), (quantize(rules=EVERY),)])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_whose_base_is_its_own_brings_it(tmp_path, dora, finish):
    base = {"layers": {"kernel": jax.random.normal(jax.random.key(0), (2, 48, 32))}}
    sizes = {}
    for init in ("zero", "pissa"):
        make = chain(lora(rank=2, init=init, dora=dora, rules=EVERY), *finish)
        trained = make(base, jax.random.key(1))
        trained = jax.tree.map(lambda a: a * 1.1 if a.dtype == jnp.float32 else a, trained)
        sizes[init] = export(trained, tmp_path / f"{init}.npz")
        if init == "pissa":
            # Read onto the base of the checkpoint, as any other adapter is.
            onto = jax.tree.map(jnp.zeros_like, trained)
            back = read_export(tmp_path / "pissa.npz", onto)
            np.testing.assert_array_equal(*(materialize(tree["layers"]["kernel"]) for tree in (back, trained)))
    # What it takes is that of the whole matrix, and is said so.
    assert sizes["pissa"] > 2 * 48 * 32 * (1 if finish else 4) * 0.8 > sizes["zero"]

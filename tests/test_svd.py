"""Matrices that devices share are decomposed as numpy decomposes whole ones, and no device ever holds one."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import normal
from sweep import sweep

from jaxcost import sharding
from jaxcost.sharding import MeshConfig
from jaxcost.transforms import prune, quantize
from jaxcost.transforms.svd import factors, singular_values
from jaxcost.weights import Inputs


def made(rows, columns, values, seed=0):
    """A matrix of these singular values."""
    random = np.random.default_rng(seed)
    u, v = (np.linalg.qr(random.normal(size=(size, len(values))))[0] for size in (rows, columns))
    return np.asarray(u * values @ v.T, np.float32)


def matrices(rows, columns):
    """A stack of all sorts of them."""
    size = min(rows, columns)
    return jnp.stack(
        [
            np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32),
            made(rows, columns, 1.0 / np.arange(1, size + 1)),
            made(rows, columns, np.logspace(0, -8, size)),
            made(rows, columns, np.where(np.arange(size) < 5, 1.0, 0.0)),
            made(rows, columns, np.where(np.arange(size) < size // 2, 1.0, 1e-3)),
            np.zeros((rows, columns), np.float32),
        ]
    )


def on(mesh, spec, w, f, *out):
    """f of a matrix that lives on a mesh so, jitted with the results living at `out`, and its compiled text."""
    with jax.set_mesh(mesh):
        places = tuple(NamedSharding(mesh, place) for place in out)
        jitted = jax.jit(f, out_shardings=places or None)
        compiled = jitted.lower(placed := jax.device_put(w, NamedSharding(mesh, spec))).compile()
        return compiled(placed), compiled


def largest_gather(compiled):
    """Entries of the largest array that a device gathers from several."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text())
    return max((int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes), default=0)


def check(w, left, right, rank):
    """That two factors of a stack are the best there are of that rank, and share the singular values."""
    for one, a, b in zip(
        *(np.asarray(x, np.float64).reshape(-1, *x.shape[-2:]) for x in (w, left, right)), strict=True
    ):
        values = np.linalg.svd(one, compute_uv=False)
        best = np.sqrt(np.sum(values[rank:] ** 2))
        assert np.linalg.norm(one - a @ b) <= best * (1 + 1e-5) + 1e-5 * values[0]
        np.testing.assert_allclose(np.sum(a**2, axis=0), values[:rank], rtol=0, atol=1e-5 * values[0])
        np.testing.assert_allclose(np.sum(b**2, axis=1), values[:rank], rtol=0, atol=1e-5 * values[0])
        assert np.all(np.max(a, axis=0) >= -np.min(a, axis=0))


@sweep("shape", [(48, 32), (32, 48), (29, 13), (3, 50)], quick=1)
def test_devices_that_share_matrices_find_what_numpy_finds(shape):
    rows, columns = shape
    w, rank = matrices(rows, columns), min(rows, columns) * 2 // 3
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    divides = rows % 4 == 0 and columns % 2 == 0
    spec = PartitionSpec(None, *(("fsdp", "tensor") if divides else (None, None)))
    (left, right, values), _ = on(mesh, spec, w, lambda w: (*factors(w, rank), singular_values(w)))
    check(w, left, right, rank)
    exact = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    np.testing.assert_allclose(
        values / np.maximum(exact[:, :1], 1e-30), exact / np.maximum(exact[:, :1], 1e-30), atol=1e-5
    )
    # And so does one device, alone.
    alone = factors(w, rank)
    check(w, *alone, rank)
    np.testing.assert_allclose(np.matmul(left, right)[:2], np.matmul(*alone)[:2], atol=1e-4)


SPLITS = {
    "inputs and outputs": ((6, 32, 48), MeshConfig(fsdp=4, tensor=2), (None, "fsdp", "tensor")),
    "outputs and inputs": ((6, 48, 32), MeshConfig(fsdp=4, tensor=2), (None, "tensor", "fsdp")),
    "layers": ((4, 48, 32), MeshConfig(stage=2, fsdp=2, tensor=2), ("stage", "fsdp", "tensor")),
    "experts": ((3, 2, 32, 48), MeshConfig(expert=2, fsdp=2, tensor=2), (None, "expert", "fsdp", "tensor")),
    "layers alone": ((8, 32, 48), MeshConfig(stage=8), ("stage", None, None)),
    "three for one": ((4, 48, 32), MeshConfig(fsdp=2, tensor=2, context=2), (None, ("fsdp", "context"), "tensor")),
    "vocabulary": ((32, 48), MeshConfig(fsdp=2, tensor=2, stage=2), ("fsdp", ("tensor", "stage"))),
    "copies": ((4, 48, 32), MeshConfig(data=2, fsdp=2, tensor=2), (None, "fsdp", "tensor")),
}


@sweep("name", SPLITS, quick=3)
def test_no_matrix_is_gathered_however_it_is_split(name):
    shape, config, spec = SPLITS[name]
    w, mesh, rank = normal(shape), sharding.make_mesh(config), 8
    out = PartitionSpec(*spec[:-1], None), PartitionSpec(*spec[:-2], None, spec[-1])
    (left, right), compiled = on(mesh, PartitionSpec(*spec), w, lambda w: factors(w, rank), *out)
    check(w, left, right, rank)
    # What is gathered is no more than a device's own part of the factors, as it is to have it.
    parts = [a.addressable_shards[0].data.size for a in (left, right)]
    assert largest_gather(compiled) <= max(*parts, 2 * min(shape[-2:]))


@pytest.mark.slow
def test_memory_falls_with_the_number_of_devices():
    def device_bytes(devices):
        mesh = sharding.make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
        w = jax.ShapeDtypeStruct((2, 512, 512), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
        with jax.set_mesh(mesh):
            compiled = jax.jit(lambda w: factors(w, 16)).lower(w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    two, four, eight = map(device_bytes, (2, 4, 8))
    assert four < 0.6 * two and eight < 0.6 * four


def test_what_is_not_a_number_stays_so_and_comes_to_an_end():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    w = normal((2, 8, 6)).at[0, 3, 2].set(jnp.nan)
    (left, right), _ = on(mesh, PartitionSpec(None, "fsdp"), w, lambda w: factors(w, 2))
    assert np.all(np.isnan(left[0])) and np.all(np.isnan(right[0]))
    check(w[1:], left[1:], right[1:], 2)


def test_columns_that_never_settle_give_no_numbers(monkeypatch):
    monkeypatch.setattr("jaxcost.transforms.svd._MOST_TOURNAMENTS", 1)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    (left, _), _ = on(mesh, PartitionSpec(None, "fsdp"), normal((8, 6)), lambda w: factors(w, 2))
    assert np.all(np.isnan(left))


STACKS = {
    "layers": ((2, 16, 24), MeshConfig(stage=2, fsdp=2, tensor=2), ("layers", "embed", "mlp")),
    "experts": ((2, 2, 16, 24), MeshConfig(expert=2, fsdp=2, tensor=2), ("layers", "expert", "embed", "mlp")),
}
BY_OUTPUTS = {
    "gptq": quantize(method="gptq"),
    "sparsegpt": prune(method="sparsegpt", block=4),
    "awq": quantize(method="awq", bits=4, group=4),
}


@sweep("case", itertools.product(STACKS, BY_OUTPUTS), quick=1)
def test_what_goes_through_a_matrix_by_outputs_leaves_stacks_where_they_are(case):
    shape, config, axes = STACKS[case[0]]
    transform, mesh = BY_OUTPUTS[case[1]], sharding.make_mesh(config)
    x = normal((*shape[:-2], 40, shape[-2]), 1)
    gram = jnp.swapaxes(x, -2, -1) @ x
    squares, largest = jnp.sum(jnp.square(x), axis=-2), jnp.max(jnp.abs(x), axis=-2)
    statistics = {"layers/kernel": Inputs(jnp.full(shape[:-2], 40.0), squares, largest, gram)}
    params, names = {"layers": {"kernel": normal(shape)}}, {"layers": {"kernel": PartitionSpec(*axes)}}
    placed = jax.device_put(params, sharding.shardings(params, names, mesh))
    places = sharding.shardings(transform.abstract(params), names, mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(transform, out_shardings=places)
        compiled = jitted.lower(placed, None, statistics).compile()
        got = compiled(placed, None, statistics)
    expected = jax.jit(transform)(params, None, statistics)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-3, atol=1e-5)
    assert largest_gather(compiled) < shape[-2] * shape[-1]

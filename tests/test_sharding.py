"""How meshes lie on devices, and where trees of weights live on a mesh whose axes do not divide them."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import small
from small import tpus
from sweep import sweep

from jaxcost import sharding
from jaxcost.models.transformer import Transformer, axes_of, initialize


@sweep("tied", [True, False], quick=0)
def test_a_vocabulary_that_the_mesh_does_not_divide_is_whole_on_every_device(tied):
    config = dataclasses.replace(small.CONFIG, vocab_size=33, tie_embeddings=tied)
    model, rng = Transformer(config), np.random.default_rng(0)
    params = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))
    batch = {"inputs": rng.integers(0, 33, (8, 6)), "targets": rng.integers(0, 33, (8, 6)), "mask": np.ones((8, 6))}

    def step(sizes):
        mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(dataclasses.astuple(sizes))])
        (metrics,), after = small.trained(model, params, [batch], mesh)
        homes = sharding.shardings(params, axes_of(model, params), mesh)
        return metrics, after, homes["embed"]["table"].spec

    want, trained, _ = step(sharding.MeshConfig())
    got, same, spec = step(sharding.MeshConfig(fsdp=4, tensor=2))
    assert spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert [got[name] for name in want] == pytest.approx([want[name] for name in want], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, trained)


# ---- Devices ----


def spanned(mesh, axis):
    """Along how many chips of each axis of the torus, and over how many slices, a line of a mesh axis goes."""
    line = np.moveaxis(mesh.devices, list(mesh.shape).index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    return tuple(len({device.coords[n] for device in line}) for n in range(3)), len({d.slice_index for d in line})


def test_axes_of_a_mesh_lie_along_axes_of_the_torus():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=16, tensor=4), tpus(4, 4, 4))
    assert sorted(spanned(mesh, "tensor")[0]) == [1, 1, 4]
    assert sorted(spanned(mesh, "fsdp")[0]) == [1, 4, 4]
    assert not any(a > 1 and b > 1 for a, b in zip(spanned(mesh, "tensor")[0], spanned(mesh, "fsdp")[0], strict=True))


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("sizes", [{"data": -1}, {"fsdp": -1, "tensor": 2}, {"data": 4, "fsdp": -1}, {"stage": 8}])
def test_every_device_is_in_a_mesh_once(sizes, slices):
    devices = tpus(2, 4, slices=slices)
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": -1, **sizes} if "stage" in sizes else sizes), devices)
    assert sorted(mesh.devices.flat, key=devices.index) == devices


def test_slices_differ_in_the_axes_that_exchange_least():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=16, tensor=4), tpus(4, 4, 2, slices=4))
    assert [spanned(mesh, axis)[1] for axis in ("data", "fsdp", "tensor")] == [2, 2, 1]
    mesh = sharding.make_mesh(sharding.MeshConfig(stage=4, data=4, fsdp=8), tpus(4, 4, 2, slices=4))
    assert [spanned(mesh, axis)[1] for axis in ("stage", "data", "fsdp")] == [4, 1, 1]


def test_chips_that_make_no_cuboid_stay_in_their_order():
    some = tpus(4, 4)[:6]
    assert sharding.make_mesh(sharding.MeshConfig(fsdp=6), some).devices.reshape(-1).tolist() == some

"""How long exchanges take: axes of a torus, rings and lines, devices of one chip, hosts and slices."""

import math
import types

import pytest

from jaxcost.cost import hardware, links

BYTES = 1_000_000
V5E_AXIS = 100e9  # bytes a second that a chip sends along one axis, in both directions of a ring


def torus(chip, *sizes, slices=1):
    """Devices as JAX lists them: slice by slice, x fastest, then the devices of a chip."""
    devices = []
    for number in range(slices):
        for chip_number in range(math.prod(sizes)):
            coordinates, rest = [], chip_number
            for size in sizes:
                rest, place = divmod(rest, size)
                coordinates.append(place)
            coordinates += [0] * (3 - len(coordinates))
            for _ in range(hardware.load_chip(chip).devices_per_chip):
                devices.append(types.SimpleNamespace(coords=coordinates, slice_index=number, process_index=0))
    return links.network_of(devices, hardware.load_chip(chip))


def hosts(chip, number, each=8):
    devices = [types.SimpleNamespace(process_index=host) for host in range(number) for _ in range(each)]
    return links.network_of(devices, hardware.load_chip(chip))


def run(kind, group, chip, network):
    return links.exchange(links.Collective(kind, BYTES, tuple(group), 1), hardware.load_chip(chip), network)


def test_a_whole_slice_uses_every_axis():
    found = run("all-gather", range(256), "v5e", torus("v5e", 16, 16))
    assert found.axes == ("links x", "links y")
    assert found.seconds == pytest.approx(255 * BYTES / (2 * V5E_AXIS))


def test_without_a_ring_an_axis_carries_half():
    found = run("all-gather", range(16), "v5e", torus("v5e", 4, 4))
    assert found.seconds == pytest.approx(15 * BYTES / V5E_AXIS)
    mixed = run("all-gather", range(128), "v6e", torus("v6e", 8, 16))
    assert mixed.seconds == pytest.approx(127 * BYTES / (200e9 / 2 + 200e9))


def test_a_group_uses_the_axes_along_which_it_lies():
    network = torus("v5e", 16, 16)
    neighbours = run("all-gather", range(4), "v5e", network)
    assert (neighbours.axes, neighbours.seconds) == (("links x",), pytest.approx(3 * BYTES / (V5E_AXIS / 2)))
    row = run("all-gather", range(16), "v5e", network)
    assert row.seconds == pytest.approx(15 * BYTES / V5E_AXIS)
    column = run("reduce-scatter", range(0, 256, 16), "v5e", network)
    assert (column.axes, column.seconds) == (("links y",), pytest.approx(15 / 16 * BYTES / V5E_AXIS))


def test_interleaved_groups_share_the_links():
    found = run("all-gather", range(0, 16, 4), "v5e", torus("v5e", 16, 16))
    assert found.seconds == pytest.approx(3 * BYTES / (V5E_AXIS / 4))


def test_an_all_reduce_is_a_scatter_and_a_gather():
    network = torus("v5p", 4, 4, 4)
    scattered, gathered = run("reduce-scatter", range(64), "v5p", network), run("all-reduce", range(64), "v5p", network)
    assert gathered.seconds == pytest.approx(2 * scattered.seconds)


def test_all_to_all_on_a_ring_passes_a_quarter():
    network = torus("v5e", 16, 16)
    found = run("all-to-all", range(16), "v5e", network)
    assert found.seconds == pytest.approx(16 * BYTES / 4 / V5E_AXIS)
    pair = run("all-to-all", range(2), "v5e", torus("v5e", 2, 1))
    assert pair.seconds == pytest.approx(BYTES / 2 / (V5E_AXIS / 2))


@pytest.mark.parametrize(("target", "hops"), [(1, 1), (4, 4), (15, 1), (8, 8)])
def test_a_permute_takes_one_direction_of_a_link_for_each_hop(target, hops):
    found = run("collective-permute", (0, target), "v5e", torus("v5e", 16, 16))
    assert found.seconds == pytest.approx(hops * BYTES / (V5E_AXIS / 2))


def test_the_devices_of_a_chip_act_as_one():
    network = torus("tpu7x", 4, 4, 4)
    inside = run("all-gather", (0, 1), "tpu7x", network)
    assert (inside.seconds, inside.axes) == (0.0, ())
    assert run("collective-permute", (0, 1), "tpu7x", network).seconds == 0.0
    everyone = run("all-gather", range(128), "tpu7x", network)
    assert everyone.seconds == pytest.approx(2 * 63 * BYTES / 600e9)
    halves = run("all-gather", range(0, 128, 2), "tpu7x", network)
    assert halves.seconds == pytest.approx(everyone.seconds)


def test_what_leaves_a_host_goes_through_its_network():
    inside = run("all-reduce", range(8), "h100", hosts("h100", 2))
    assert inside.seconds == pytest.approx(2 * 7 / 8 * BYTES / 450e9)
    both = run("all-reduce", range(16), "h100", hosts("h100", 2))
    assert both.link_seconds == pytest.approx(inside.seconds)
    assert both.network_seconds == pytest.approx(2 / 2 * BYTES / 8 / 50e9)
    gathered = run("all-gather", range(16), "h100", hosts("h100", 2))
    assert gathered.link_seconds == pytest.approx(2 * 7 * BYTES / 450e9)
    assert gathered.network_seconds == pytest.approx(BYTES / 50e9)


def test_what_leaves_a_slice_goes_through_the_data_centre():
    network = torus("v5e", 4, 4, slices=2)
    between = run("all-reduce", (0, 16), "v5e", network)
    assert (between.link_seconds, between.axes) == (0.0, ())
    assert between.network_seconds == pytest.approx(BYTES / 3.125e9)
    assert run("collective-permute", (0, 16), "v5e", network).seconds == pytest.approx(BYTES / 3.125e9)


def test_an_unknown_bandwidth_stays_unknown():
    found = run("all-gather", range(4), "l4", hosts("l4", 1, each=4))
    assert found.seconds is None and found.axes == ("links",)
    assert run("all-gather", range(8), "v3", torus("v3", 2, 2)).seconds is None
    assert run("all-reduce", (0, 8), "v3", torus("v3", 2, 2, slices=2)).network_seconds is None

"""How long an exchange between devices takes: which torus axes its groups span, and what leaves the slice.

Devices of one *domain* (a TPU slice, a host of GPUs) are joined by fast links, domains by the data-centre network. On a
torus, a group uses the links of the axes along which its members differ; an axis carries half as much where the group
does not close a ring on it, and is shared where groups interleave. Behind a switch, a chip uses all its links at once.
Exchanges are hierarchical: a chip's devices act as one, and each chip sends its part of what leaves the domain.

Source: ring and dimension-ordered algorithms as in the JAX scaling book, sharding.md, for the torus; Thakur,
Rabenseifner and Gropp 2005 for the bytes of each kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxcost.cost import hardware

SWITCH, NETWORK = "links", "network"
_AXES = ("links x", "links y", "links z")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices, as often as the program runs it."""

    kind: str
    """`all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute` or `collective-broadcast`."""
    operand_bytes: int
    """Bytes that one device puts in."""
    group: tuple[int, ...]
    """Devices of the first group that exchange with each other; of a permute, the first sender and its receiver."""
    times: int
    """How often the program runs it."""

    @property
    def group_size(self) -> int:
        """Devices that exchange with each other."""
        return len(self.group)

    @property
    def link_bytes(self) -> int:
        """Bytes that one device sends in all runs, with ring algorithms.

        An all-gather passes on n - 1 shards, a reduce-scatter (n - 1) / n of its input, an all-reduce both.
        """
        peers = self.group_size - 1
        share = self.operand_bytes * peers // max(1, self.group_size)
        sent = {
            "all-gather": self.operand_bytes * peers,
            "all-reduce": 2 * share,
            "collective-permute": self.operand_bytes,
            "collective-broadcast": self.operand_bytes if peers else 0,
        }
        return sent.get(self.kind, share) * self.times


@dataclasses.dataclass(frozen=True)
class Network:
    """Where a program's devices sit, in the order of their partition numbers."""

    domains: tuple[int, ...]
    """The slice or host of each device."""
    chips: tuple[tuple[int, ...], ...]
    """Coordinates of each device's chip on its slice's torus; behind a switch, its number in the host."""
    sizes: tuple[int, ...] = ()
    """Chips along each axis of the torus; empty behind a switch."""
    wraps: tuple[bool, ...] = ()
    """Whether the links of each axis close a ring."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One run of a collective, in seconds by what it keeps busy; None where a figure of the chip is unknown."""

    link_seconds: float | None
    network_seconds: float | None
    axes: tuple[str, ...]
    """What its links are: torus axes, or `links` behind a switch; empty if nothing leaves a chip by them."""

    @property
    def seconds(self) -> float | None:
        """The links' and the network's seconds, one after the other."""
        if self.link_seconds is None or self.network_seconds is None:
            return None
        return self.link_seconds + self.network_seconds


def wraps_of(chip: hardware.Chip, sizes: Sequence[int]) -> tuple[bool, ...]:
    """For each axis of a slice, whether its links close a ring: where its size is a multiple of the chip's."""
    return tuple(chip.ring_multiple > 0 and size % chip.ring_multiple == 0 for size in sizes)


def network_of(devices: Sequence[Any], chip: hardware.Chip) -> Network:
    """The network that joins JAX devices, described or real, in the order of a mesh.

    A program of several slices numbers the devices of each by themselves, so those of one slice stand together.
    """
    if not chip.torus_axes:
        hosts = tuple(device.process_index for device in devices)
        return Network(hosts, tuple((number,) for number in range(len(devices))))
    devices = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    slices = tuple(getattr(device, "slice_index", 0) for device in devices)
    chips = tuple(tuple(device.coords)[: chip.torus_axes] for device in devices)
    sizes = tuple(max(axis) - min(axis) + 1 for axis in zip(*chips, strict=True))
    return Network(slices, chips, sizes, wraps_of(chip, sizes))


def switched(num_devices: int) -> Network:
    """A network of so many devices behind one switch: what is assumed where nothing says how they are joined."""
    return Network((0,) * num_devices, tuple((number,) for number in range(num_devices)))


def exchange(collective: Collective, chip: hardware.Chip, network: Network) -> Exchange:
    """One run of a collective on a chip's links and network."""
    if collective.kind == "collective-permute":
        return _permute(collective, chip, network)
    members = [d for d in collective.group if network.domains[d] == network.domains[collective.group[0]]]
    chips = sorted({network.chips[d] for d in members})
    domains = len({network.domains[d] for d in collective.group})
    devices = len(members) // len(chips)
    # Where a group takes one device of each chip, the chip's other devices have groups of their own on the same links.
    groups = chip.devices_per_chip / devices if network.sizes else 1
    on_links, on_network = (groups * sent for sent in _bytes_leaving(collective, devices, len(chips), domains))
    axes, rate, all_to_all = _links_of(chips, chip, network)
    if collective.kind == "all-to-all" and network.sizes:
        link_seconds = all_to_all and on_links * all_to_all
    else:
        link_seconds = 0.0 if not on_links else None if rate is None else on_links / rate
    nic = chip.network_bytes_per_second.value
    network_seconds = 0.0 if not on_network else None if nic is None else on_network / nic
    return Exchange(link_seconds, network_seconds, axes if on_links else ())


def _bytes_leaving(collective: Collective, devices: int, chips: int, domains: int) -> tuple[float, float]:
    """Bytes that a chip sends to its domain's other chips, and out of the domain."""
    operand = collective.operand_bytes
    if collective.kind == "all-gather":
        return operand * devices * domains * (chips - 1), operand * devices * (domains - 1)
    if collective.kind == "all-to-all":
        other = devices * operand
        return other * (chips - 1) / chips, other * (domains - 1) / domains
    if collective.kind == "collective-broadcast":
        return operand * (chips > 1), operand * (domains > 1) / chips
    # An all-gather of a scattered operand, backwards; an all-reduce is both.
    passes = 2 if collective.kind == "all-reduce" else 1
    return passes * operand * (chips - 1) / chips, passes * operand * (domains - 1) / (domains * chips)


def _links_of(chips, chip: hardware.Chip, network: Network) -> tuple[tuple[str, ...], float | None, float | None]:
    """The axes that a group of chips spans, bytes a second that each of them sends there, seconds a byte all-to-all."""
    whole = chip.link_bytes_per_second.value
    if not network.sizes:
        return (SWITCH,), whole and whole / 2, None
    axes, rate, slowest = [], 0.0, 0.0
    for number, size in enumerate(network.sizes):
        places = sorted({c[number] for c in chips})
        if len(places) == 1:
            continue
        stride = min(b - a for a, b in zip(places, places[1:], strict=False))
        closed = network.wraps[number] and len(places) * stride == size
        axes.append(_AXES[number])
        # Half of the whole is one direction; without a ring, each byte crosses a link in one direction only.
        axis = (whole or math.nan) / 2 / chip.torus_axes * (1.0 if closed else 0.5) / stride
        rate += axis
        # A quarter of a ring's devices are passed on the way on average.
        slowest = max(slowest, len(places) / 4 / axis * len(chips) / max(1, len(chips) - 1))
    return tuple(axes), (rate if whole else None), (slowest if whole else None)


def _permute(collective: Collective, chip: hardware.Chip, network: Network) -> Exchange:
    source, target = collective.group[0], collective.group[-1]
    if network.domains[source] != network.domains[target]:
        nic = chip.network_bytes_per_second.value
        return Exchange(0.0, None if nic is None else collective.operand_bytes / nic, ())
    whole = chip.link_bytes_per_second.value
    if not network.sizes:
        return Exchange(None if whole is None else collective.operand_bytes / (whole / 2), 0.0, (SWITCH,))
    apart = [abs(a - b) for a, b in zip(network.chips[source], network.chips[target], strict=True)]
    rings = zip(apart, network.sizes, network.wraps, strict=True)
    hops = [min(far, size - far) if closed else far for far, size, closed in rings]
    axes = tuple(_AXES[number] for number, far in enumerate(hops) if far)
    if not axes:
        return Exchange(0.0, 0.0, ())
    if whole is None:
        return Exchange(None, 0.0, axes)
    # All go the same way, so a link carries one direction of one axis, for as many senders as there are hops.
    link = whole / 2 / chip.torus_axes / 2
    return Exchange(collective.operand_bytes * chip.devices_per_chip * max(hops) / link, 0.0, axes)

"""Chips, their prices and their power: what a second on them costs in money, energy and carbon.

Every figure comes from `chips.json` or `prices.json` with its source and date, or from the user. An unknown figure
stays `None`, and so does everything that would be computed from it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

LOCAL = "local"
USER_SOURCE = "given by the user"
_DIRECTORY = pathlib.Path(__file__).parent
_SECONDS_PER_HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number with where and when it was read; `value` is None where it is unknown."""

    value: float | None
    source: str = "unknown"
    date: str | None = None

    @property
    def provenance(self) -> str:
        """Source and date, as a table prints them."""
        return f"{self.source}, {self.date}" if self.date else self.source


UNKNOWN = Figure(None)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do; figures are of a whole chip unless their name says a device."""

    name: str
    """The name that `load_chip` takes: `v5e`, `h100`, `cpu`, ..."""
    kind: str
    """`tpu`, `gpu` or `cpu`."""
    description: str
    """The chip's full name, for people."""
    device_kinds: tuple[str, ...] = ()
    """What `jax.Device.device_kind` says on this chip."""
    devices_per_chip: int = 1
    """JAX devices on one chip."""
    peak_flops_per_second: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    """Dense peak by operand type (`bf16`, `int8`, `fp8`, `f32`), f32 at JAX's default precision for it."""
    hbm_bytes: Figure = UNKNOWN
    """Memory of the chip."""
    hbm_bytes_per_second: Figure = UNKNOWN
    """Memory bandwidth of the chip."""
    usable_bytes_per_device: Figure = UNKNOWN
    """Memory of one device that a program may use; less than the datasheet's."""
    clock_hz: Figure = UNKNOWN
    """Clock of the matrix unit."""
    link_bytes_per_second: Figure = UNKNOWN
    """Chip-to-chip bandwidth over all links, both directions together."""
    pod_chips: Figure = UNKNOWN
    """Chips of a whole pod, the largest slice."""
    torus_axes: int = 0
    """Axes of the torus that the links make; 0 where a switch joins the chips of a host."""
    ring_multiple: int = 0
    """An axis of a slice closes a ring if its size is a multiple of this; 0 where none does or it is unknown."""
    network_bytes_per_second: Figure = UNKNOWN
    """A chip's part of what its host sends into the data-centre network, one direction."""
    watts: Figure = UNKNOWN
    """Power of the chip; its source says whether it is a measured mean or a limit."""

    def peak(self, operand_type: str) -> float | None:
        """Dense peak in FLOP/s of a chip for one operand type, or None if it is unknown."""
        return self.peak_flops_per_second.get(operand_type, UNKNOWN).value


@dataclasses.dataclass(frozen=True)
class Price:
    """What an hour of one chip costs, where and when."""

    chip: str
    usd_per_chip_hour: float
    terms: str
    source: str
    date: str

    def figure(self) -> Figure:
        """The price as a figure whose source names the terms."""
        return Figure(self.usd_per_chip_hour, f"{self.terms}: {self.source}", self.date)


@functools.cache
def _read(name: str) -> dict[str, Any]:
    return json.loads((_DIRECTORY / name).read_text())


@functools.cache
def known_chips() -> dict[str, Chip]:
    """Every chip of `chips.json`, by name."""
    return {row["name"]: _chip_from_row(row) for row in _read("chips.json")["chips"]}


def _chip_from_row(row: dict[str, Any]) -> Chip:
    values = {
        key: Figure(**value) if isinstance(value, dict) and "value" in value else value for key, value in row.items()
    }
    values["device_kinds"] = tuple(row["device_kinds"])
    values["peak_flops_per_second"] = {kind: Figure(**figure) for kind, figure in row["peak_flops_per_second"].items()}
    return Chip(**values)


def load_chip(name: str) -> Chip:
    """The chip called `name`.

    Args:
        name: one of `known_chips()`, or `local` for the one that JAX runs on here.

    Raises:
        ValueError: no such chip.
    """
    if name == LOCAL:
        return local_chip()
    chips = known_chips()
    if name not in chips:
        raise ValueError(f"hardware.chip is {name!r}; it must be {LOCAL!r} or one of {', '.join(chips)}.")
    return chips[name]


def local_chip() -> Chip:
    """The chip of JAX's first device; an accelerator missing from `chips.json` has no known figures."""
    import jax

    device = jax.devices()[0]
    for chip in known_chips().values():
        if device.device_kind in chip.device_kinds:
            return chip
    if device.platform == "cpu":
        return known_chips()["cpu"]
    return Chip(name=device.device_kind, kind=device.platform, description=device.device_kind)


def prices_of(chip: str) -> tuple[Price, ...]:
    """The known prices of a chip, the one taken by default first; empty if none is known."""
    return tuple(Price(**row) for row in _read("prices.json")["prices"] if row["chip"] == chip)


def _assumption(name: str) -> Figure:
    return Figure(**_read("prices.json")["assumptions"][name])


@dataclasses.dataclass(frozen=True)
class HardwareConfig:
    """The chips that a run is priced on."""

    chip: str = LOCAL
    """Chip: `local` for the one that JAX finds here, or a name such as v5e, h100 or cpu."""
    num_chips: int = 0
    """Chips paid for; 0 is those of JAX's devices if they are of this chip, else 1. A CPU host is one chip."""
    usd_per_chip_hour: float | None = None
    """Price of one chip for an hour; unset takes the table's, whose source and date are printed."""
    watts_per_chip: float | None = None
    """Power of one chip; unset takes the table's, whose source and date are printed."""
    pue: float = _assumption("pue").value
    """Power usage effectiveness: energy into the data centre over energy into its machines."""
    grid_kg_co2_per_kwh: float = _assumption("grid_kg_co2_per_kwh").value
    """Carbon intensity of the electricity, in kg of CO2 equivalent a kWh."""

    def __post_init__(self):
        if self.chip != LOCAL:
            load_chip(self.chip)
        if self.num_chips < 0:
            raise ValueError(f"hardware.num_chips is {self.num_chips}; use 0 for this machine's or a positive number.")
        for field in ("usd_per_chip_hour", "watts_per_chip", "grid_kg_co2_per_kwh"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ValueError(f"hardware.{field} is {value}; it cannot be negative.")
        if self.pue < 1:
            raise ValueError(f"hardware.pue is {self.pue}; it is a ratio of at least 1.")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A number of chips with their price and power, each figure with its source."""

    chip: Chip
    num_chips: float
    """Less than 1 where several trainings share a chip."""
    usd_per_chip_hour: Figure
    watts_per_chip: Figure
    pue: Figure
    grid_kg_co2_per_kwh: Figure

    def chip_hours(self, seconds: float) -> float:
        """Chip-hours of `seconds` on all chips."""
        return self.num_chips * seconds / _SECONDS_PER_HOUR

    def usd(self, seconds: float) -> float | None:
        """Price in US dollars of `seconds` on all chips, or None if the chip's price is unknown."""
        if self.usd_per_chip_hour.value is None:
            return None
        return self.chip_hours(seconds) * self.usd_per_chip_hour.value

    def kwh(self, seconds: float) -> float | None:
        """Energy of `seconds` on all chips, the data centre's share included: chips * W * hours * PUE / 1000.

        None if the chip's power is unknown. The host's processors, memory and network are not in it.
        """
        if self.watts_per_chip.value is None:
            return None
        return self.chip_hours(seconds) * self.watts_per_chip.value * self.pue.value / 1000

    def kg_co2(self, kwh: float | None) -> float | None:
        """Carbon of `kwh` of energy in kg of CO2 equivalent, or None if the energy is unknown."""
        return None if kwh is None else kwh * self.grid_kg_co2_per_kwh.value

    def figures(self) -> dict[str, Figure]:
        """The figures that prices and energy rest on, to print with their sources."""
        names = ("usd_per_chip_hour", "watts_per_chip", "pue", "grid_kg_co2_per_kwh")
        return {name: getattr(self, name) for name in names}


def resolve(config: HardwareConfig) -> Hardware:
    """Looks up the chip, its price and its power, and counts the chips.

    Imports JAX only if the chip is `local` or `num_chips` is 0.

    Raises:
        ValueError: no such chip.
    """
    chip = load_chip(config.chip)
    prices = prices_of(chip.name)
    return Hardware(
        chip=chip,
        num_chips=config.num_chips or _count_chips(chip),
        usd_per_chip_hour=_overridden(config.usd_per_chip_hour, prices[0].figure() if prices else UNKNOWN),
        watts_per_chip=_overridden(config.watts_per_chip, chip.watts),
        pue=_overridden(config.pue, _assumption("pue")),
        grid_kg_co2_per_kwh=_overridden(config.grid_kg_co2_per_kwh, _assumption("grid_kg_co2_per_kwh")),
    )


def _overridden(given: float | None, table: Figure) -> Figure:
    return table if given is None or given == table.value else Figure(given, USER_SOURCE)


def _count_chips(chip: Chip) -> int:
    """Chips of JAX's devices if they are of this kind, else 1; virtual devices of a CPU host are one chip."""
    import jax

    if local_chip().name != chip.name:
        return 1
    if chip.kind == "cpu":
        return jax.process_count()
    return -(-len(jax.devices()) // chip.devices_per_chip)

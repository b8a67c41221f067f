"""Chips, prices and the roofline: every figure has a source, and what is unknown stays unknown."""

import dataclasses
import re
import subprocess
import sys

import pytest

from jaxcost.cost import hardware, roofline


def all_figures():
    for chip in hardware.known_chips().values():
        for kind, figure in chip.peak_flops_per_second.items():
            yield f"{chip.name} {kind}", figure
        for field in dataclasses.fields(chip):
            value = getattr(chip, field.name)
            if isinstance(value, hardware.Figure):
                yield f"{chip.name} {field.name}", value
    for name, figure in hardware.resolve(hardware.HardwareConfig(chip="cpu", num_chips=1)).figures().items():
        yield name, figure


@pytest.mark.parametrize(("name", "figure"), all_figures())
def test_every_known_figure_has_a_source_and_a_date(name, figure):
    if figure.value is None:
        assert figure == hardware.UNKNOWN
    else:
        assert figure.value > 0
        assert figure.source != "unknown"
        assert re.fullmatch(r"20\d\d-\d\d", figure.date)


@pytest.mark.parametrize("name", hardware.known_chips())
def test_every_price_has_a_source_and_a_date(name):
    for price in hardware.prices_of(name):
        assert price.usd_per_chip_hour > 0
        assert price.source and price.terms
        assert re.fullmatch(r"20\d\d-\d\d", price.date)


def test_chips_are_consistent():
    for chip in hardware.known_chips().values():
        usable, hbm = chip.usable_bytes_per_device.value, chip.hbm_bytes.value
        assert usable is None or usable * chip.devices_per_chip <= hbm
        assert chip.peak("bf16") > 0
        assert chip.peak("int8") is None or chip.peak("int8") >= chip.peak("bf16")


def test_dense_figures_are_not_the_sparse_ones():
    assert hardware.load_chip("h200").peak("bf16") == 989e12


def test_wrong_chip_is_named_at_once():
    message = r"hardware.chip is 'v9'; it must be 'local' or one of v3, .*cpu\.$"
    with pytest.raises(ValueError, match=message):
        hardware.load_chip("v9")
    with pytest.raises(ValueError, match=message):
        hardware.HardwareConfig(chip="v9")


@pytest.mark.parametrize(
    "wrong", [{"num_chips": -1}, {"usd_per_chip_hour": -1.0}, {"watts_per_chip": -1.0}, {"pue": 0.9}]
)
def test_impossible_figures_are_refused(wrong):
    with pytest.raises(ValueError, match=f"hardware.{next(iter(wrong))} is"):
        hardware.HardwareConfig(**wrong)


def test_local_chip_of_a_cpu_host_is_one_chip():
    resolved = hardware.resolve(hardware.HardwareConfig())
    assert (resolved.chip.name, resolved.num_chips) == ("cpu", 1)


def test_chip_that_is_not_here_counts_as_one():
    assert hardware.resolve(hardware.HardwareConfig(chip="v5e")).num_chips == 1


def test_hours_money_energy_and_carbon():
    config = hardware.HardwareConfig(
        chip="v5e", num_chips=16, usd_per_chip_hour=1.5, watts_per_chip=200, pue=1.1, grid_kg_co2_per_kwh=0.4
    )
    resolved = hardware.resolve(config)
    assert resolved.chip_hours(1800) == 8
    assert resolved.usd(1800) == 12
    assert resolved.kwh(1800) == pytest.approx(8 * 200 * 1.1 / 1000)
    assert resolved.kg_co2(resolved.kwh(1800)) == pytest.approx(0.704)
    assert {figure.source for figure in resolved.figures().values()} == {hardware.USER_SOURCE}


def test_unknown_price_and_power_give_no_cost():
    resolved = hardware.resolve(hardware.HardwareConfig(chip="tpu7x", num_chips=4))
    assert resolved.usd(10) is None
    assert resolved.kwh(10) is None
    assert resolved.kg_co2(resolved.kwh(10)) is None
    assert resolved.figures()["usd_per_chip_hour"].provenance == "unknown"


def test_table_price_prints_with_its_source():
    price = hardware.resolve(hardware.HardwareConfig(chip="v5e", num_chips=1)).usd_per_chip_hour
    assert price.value == 1.2
    assert "scaling book" in price.provenance and "2025-02" in price.provenance


def test_importing_and_resolving_a_named_chip_does_not_import_jax():
    code = (
        "import sys; from jaxcost.cost import hardware as h; "
        "h.resolve(h.HardwareConfig(chip='v5e', num_chips=8)); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_roofline_names_its_limit():
    chip = hardware.load_chip("v5e")
    bound = roofline.lower_bound(
        chip, {"bf16": 197e12, "int8": 393e12}, hbm_bytes=819e9, exchange_seconds={"links x": 0.25}
    )
    assert bound.terms == {"compute": 2.0, "memory": 1.0, "links x": 0.25}
    assert (bound.seconds, bound.limit, bound.unknown) == (2.0, "compute", ())
    assert roofline.lower_bound(chip, {}, hbm_bytes=819e9).limit == "memory"
    assert roofline.lower_bound(chip, {}, exchange_seconds={"network": 1.0}).limit == "network"


def test_roofline_of_one_device_of_a_chip_with_two():
    chip = hardware.load_chip("tpu7x")
    assert roofline.lower_bound(chip, {"bf16": 2307e12}).seconds == 2.0


def test_roofline_says_what_it_does_not_know():
    bound = roofline.lower_bound(hardware.load_chip("l4"), {"f32": 1e12}, 300e9, {"links": None})
    assert (bound.seconds, bound.limit) == (1.0, "memory")
    assert bound.terms["compute"] is None and bound.terms["links"] is None
    assert bound.unknown == ("peak f32 FLOP/s", "links bandwidth")
    unknown = roofline.lower_bound(hardware.Chip("x", "gpu", "x"), {"bf16": 1.0})
    assert unknown.seconds is None and unknown.limit is None

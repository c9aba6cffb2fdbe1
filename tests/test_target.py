"""Names of targets, and that every row of the table has what is asked of it."""

import pytest

from pallas_kernels.devices import DEVICES
from xlinfer.target import CHIPS, TargetError, larger, parse_target


@pytest.mark.parametrize(
    "name, devices, hosts, shape",
    [
        ("cpu", 1, 1, "1"),
        ("cpu-4", 4, 1, "4"),
        ("h200", 1, 1, "1x1x1"),
        ("h100-8", 8, 1, "1x1x8"),
        ("v5e-8", 8, 1, "2x4"),
        ("v5e-16", 16, 4, "4x4"),
        ("v6e-1", 1, 1, "1x1"),
        ("v5p-8", 8, 2, "2x2x2"),
        ("tpu7x-4", 8, 1, "2x2x1"),
    ],
)
def test_a_name_says_how_many_devices_there_are(name, devices, hosts, shape):
    target = parse_target(name)
    assert (target.devices, target.hosts, target.shape) == (devices, hosts, shape)
    assert target.name == name


def test_one_device_needs_no_number_but_a_tpu_slice_is_named_with_it():
    assert parse_target("h200-1").name == "h200"
    assert parse_target("v6e").name == "v6e-1"
    assert parse_target(" v6e-8 ").name == "v6e-8"


@pytest.mark.parametrize(
    "name, said",
    [
        ("v6", "Did you mean v6e"),
        ("h300", "is none of cpu, h100, h200"),
        ("", "is none of"),
        ("v6e-8-8", "is none of"),
        ("V6E-8", "is none of"),
        ("v6e-3", "v6e comes as v6e-1, v6e-4, v6e-8, v6e-16"),
        ("v6e-0", "v6e comes as"),
        ("h100-16", "h100 comes as h100-1, h100-2, h100-4, h100-8"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(name, said):
    with pytest.raises(TargetError, match=said):
        parse_target(name)


def test_larger_slices_come_smallest_first():
    assert [target.name for target in larger(parse_target("v6e-16"))] == [
        "v6e-32", "v6e-64", "v6e-128", "v6e-256",
    ]  # fmt: skip
    assert larger(parse_target("h200-8")) == ()


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_chip_has_kernels_or_a_reason_and_rates_of_what_weights_are_computed_in(chip):
    if chip.refused:
        assert chip.planned_as in DEVICES and chip.name not in DEVICES
    else:
        assert DEVICES[chip.name].platform == chip.platform
    assert {"float32", "bfloat16"} <= chip.flops.keys()
    assert chip.one_host in chip.slices and 1 in chip.slices

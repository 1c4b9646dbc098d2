"""Efficiency, and where the network takes over."""

import dataclasses

import pytest
from plan_cases import eight_devices, plan

from jaxdist import errors
from jaxdist.plan import device_sweep, estimate


def made(devices, **bounds):
    bounds = {"compute": 1.0, "memory": 0.5, "network": 0.1} | bounds
    return dataclasses.replace(plan()[1], num_devices=devices, global_batch_size=10 * devices, bound_seconds=bounds)


def test_efficiency_is_of_the_first_row_and_the_network_takes_over_once():
    rows = device_sweep.rows([made(8), made(16, network=1.5), made(64, network=4.0)])
    assert [row.efficiency for row in rows] == pytest.approx([1.0, 2 / 3, 0.25])
    assert [row.relief for row in rows] == [1, 2, 4]
    assert device_sweep.takes_over(rows) == 16
    assert device_sweep.takes_over(rows[:1]) is None


def test_an_extrapolated_plan_is_that_of_the_compiler():
    """From the program for two devices to that for eight."""
    experiment, eight = plan()
    where = eight_devices()
    two = dataclasses.replace(where, devices=where.devices[:2])
    small = estimate.estimate(dataclasses.replace(experiment, global_batch_size=4), two)
    found = device_sweep.extrapolate(small, 8)
    assert found.bound_seconds["network"] == pytest.approx(eight.bound_seconds["network"])
    assert found.collectives["all-reduce"][1] == pytest.approx(eight.collectives["all-reduce"][1])
    assert (found.num_devices, found.global_batch_size, found.mesh) == (8, 16, {"data": 8})
    assert found.flops_per_step == eight.flops_per_step


def test_an_extrapolation_is_to_a_multiple():
    with pytest.raises(errors.UserError, match="multiples of the 8 devices"):
        device_sweep.extrapolate(made(8), 12)


def test_a_network_that_bounds_only_in_between_does_not_take_over():
    rows = device_sweep.rows([made(8), made(16, network=1.5), made(64)])
    assert device_sweep.takes_over(rows) is None

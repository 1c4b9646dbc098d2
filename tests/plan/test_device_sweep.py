"""Efficiency, and where the network takes over."""

import dataclasses

import pytest
from plan_cases import plan

from jaxdist.plan import device_sweep


def made(devices, **bounds):
    bounds = {"compute": 1.0, "memory": 0.5, "network": 0.1} | bounds
    return dataclasses.replace(plan()[1], num_devices=devices, global_batch_size=10 * devices, bound_seconds=bounds)


def test_efficiency_is_of_the_first_row_and_the_network_takes_over_once():
    rows = device_sweep.rows([made(8), made(16, network=1.5), made(64, network=4.0)])
    assert [row.efficiency for row in rows] == pytest.approx([1.0, 2 / 3, 0.25])
    assert [row.relief for row in rows] == [1, 2, 4]
    assert device_sweep.takes_over(rows) == 16
    assert device_sweep.takes_over(rows[:1]) is None


def test_a_network_that_bounds_only_in_between_does_not_take_over():
    rows = device_sweep.rows([made(8), made(16, network=1.5), made(64)])
    assert device_sweep.takes_over(rows) is None

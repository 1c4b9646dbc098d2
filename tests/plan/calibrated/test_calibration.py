"""A calibration is made once for so many devices of this machine, and kept."""

import jax
import pytest

from jaxdist.plan.calibrated import calibration, measuring
from jaxdist.plan.calibrated import operation_rates as rates
from jaxdist.plan.compiled import facts
from jaxdist.plan.compiled.operations import ELEMENTWISE, Operation


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Return the numbers of devices that were measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure(experiments, devices, *, show):
        calls.append(len(devices))
        return [rates.MeasuredProgram("any", [Operation("a", ELEMENTWISE, num_bytes=8)], [1e-3], 2e-3)]

    monkeypatch.setattr(measuring, "measure", measure)
    return calls


def find(count):
    return calibration.find(jax.devices()[:count], show=lambda *what: None)


def test_the_second_time_nothing_is_measured(measured):
    first = find(1)
    assert find(1) == first
    assert first.programs == {"any": 2e-3}
    assert "median error 0%" in first.describe()
    find(2)
    assert measured == [1, 2]
    assert first.rates.of(*measuring.measure([], [], show=None)) == pytest.approx(2e-3)


def test_a_damaged_file_is_measured_again(measured):
    find(1)
    (file,) = facts.cache_folder().iterdir()
    file.write_text(file.read_text()[:-9])
    find(1)
    assert measured == [1, 1]

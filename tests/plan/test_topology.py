import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist import errors
from jaxdist.launch.joining import runtime
from jaxdist.plan import topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpu:0", "cpu:N with N up to 256"),
        ("cpu:many", "Did you mean 'cpu:"),
        ("tpu:v9:2x2", "Did you mean 'tpu:v"),
        ("tpu", "There is no topology"),
        ("gpu:h100:8", "cannot be compiled for yet"),
        ("", "There is no topology"),
    ],
)
def test_what_is_no_topology_is_refused_with_all_that_are(name, message):
    with pytest.raises(errors.UserError, match=message) as caught:
        topology.find(name)
    assert "tpu:v5e:16x16" in str(caught.value)


def test_a_tpu_without_its_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match=r"pip install 'jaxdist\[tpu\]'"):
        topology.find("tpu:v5e:4x4")


def test_fake_devices_share_what_this_machine_was_measured_to_do(monkeypatch):
    monkeypatch.setattr(runtime, "start_by_itself", lambda count: jax.devices()[:count])
    two, eight = topology.find("cpu:2"), topology.find("cpu:8")
    assert (len(two.devices), len(eight.devices)) == (2, 8)
    assert two.runs_here
    assert two.chip.memory_bytes is None
    assert min(two.chip.flops_per_second, eight.chip.memory_bytes_per_second) > 0


@given(count=st.integers(1, 5000), dims=st.integers(1, 3))
def test_factors_multiply_to_the_count_and_ascend(count, dims):
    factors = topology.even_factors(count, dims)
    assert math.prod(factors) == count
    assert list(factors) == sorted(factors)
    assert len(factors) == dims


@pytest.mark.parametrize(("count", "dims", "factors"), [(32, 2, (4, 8)), (32, 3, (2, 4, 4)), (256, 2, (16, 16))])
def test_factors_are_as_equal_as_they_can_be(count, dims, factors):
    assert topology.even_factors(count, dims) == factors

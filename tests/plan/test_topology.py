import dataclasses
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist import errors
from jaxdist.launch.joining import runtime
from jaxdist.plan import chips, topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpu:0", "cpu:N with N up to 256"),
        ("cpu:many", "Did you mean 'cpu:"),
        ("tpu:v9:2x2", "Did you mean 'tpu:v"),
        ("tpu", "There is no topology"),
        ("cpu:999", "Did you mean 'cpu:256'"),
        ("gpu:h100:12", "Did you mean 'gpu:h100:16'"),
        ("GPU:h100:8", "Did you mean 'gpu:h100:8'"),
        ("tpu:v5e:4x", "Did you mean 'tpu:v5e:4x4'"),
        ("gpu:h1000:8", "Did you mean 'gpu:h100:8'"),
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
    with pytest.raises(errors.UserError, match=r"pip install 'jaxdist\[gpu\]'"):
        topology.find("gpu:h100:8")


@pytest.mark.parametrize("count", [0, 9, 12, 2048])
def test_gpus_fill_their_hosts(count):
    with pytest.raises(errors.UserError, match="a multiple of it up to 1024"):
        topology.find(f"gpu:h100:{count}")


def test_a_compiler_that_cannot_describe_it_is_a_message(monkeypatch):
    def get_topology_desc(*args, **options):
        raise RuntimeError("no such shape")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", get_topology_desc)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(runtime, "start_by_itself", lambda count: jax.devices()[:count])
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    for name in ("tpu:v5e:15x16", "gpu:h100:8"):
        with pytest.raises(errors.UserError, match="no such shape"):
            topology.find(name)


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


def test_only_devices_that_are_here_are_calibrated(monkeypatch):
    there = topology.Topology("tpu:v5e:4x4", jax.devices()[:1], chips.TPUS["v5e"], runs_here=False)
    with pytest.raises(errors.UserError, match="those of tpu:v5e:4x4 are not here"):
        topology.calibrated(there, show=print)
    here = dataclasses.replace(there, name="cpu:1", runs_here=True)
    monkeypatch.setattr(topology.calibration, "find", lambda devices, show: (len(devices), show))
    assert topology.calibrated(here, show=print).calibration == (1, print)


def test_a_torus_that_would_end_the_process_is_refused(monkeypatch):
    def get_topology_desc(*args, **options):
        raise AssertionError("libtpu was asked")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", get_topology_desc)
    there = topology.Topology("tpu:v5e:16x16", jax.devices()[:1], chips.TPUS["v5e"], runs_here=False)
    with pytest.raises(errors.UserError, match=r"32x32 has a side of 32 chips.* 'tpu:v5e:16x16'"):
        topology.with_devices(there, 1024)

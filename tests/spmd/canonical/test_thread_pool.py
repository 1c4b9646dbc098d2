"""The number of XLA's threads of a canonical run, and what is said where it depends on the machine."""

import contextlib
import os
import warnings
from unittest import mock

import hypothesis
import pytest
from hypothesis import strategies as some

from jaxdist.spmd.canonical import thread_pool


@contextlib.contextmanager
def cores(number):
    with mock.patch.object(os, "sched_getaffinity", return_value=set(range(number))):
        yield


@pytest.mark.parametrize(
    ("usable", "environment", "devices", "threads"),
    [
        (4, {}, 1, 4),
        (4, {}, 8, 8),
        (1, {"NPROC": "2"}, 1, 2),
        (4, {"NPROC": "1"}, 1, 1),
        (4, {"NPROC": "2", "PJRT_NPROC": "1"}, 1, 1),
        (1, {"NPROC": "1", "PJRT_NPROC": "3"}, 1, 3),
        (4, {"NPROC": "many"}, 1, 4),
    ],
)
def test_xla_has_as_many_threads_as(usable, environment, devices, threads):
    with cores(usable):
        assert thread_pool.size(devices, environment) == threads


@pytest.mark.parametrize("environment", [{}, {"NPROC": "1"}, {"PJRT_NPROC": "1"}])
def test_a_thread_pool_of_one_is_refused(environment):
    """XLA then generates other code, and the bits would not be those of other machines."""
    with cores(1), pytest.raises(ValueError, match="Set PJRT_NPROC=8"):
        thread_pool.check(8, 1, environment)


@hypothesis.given(some.integers(1, 256), some.integers(1, 64), some.data())
def test_a_canonical_run_has_the_same_threads_on_any_machine_and_number_of_devices(usable, shards, draw):
    devices, environment = draw.draw(some.integers(1, shards)), draw.draw(some.sampled_from([{}, {"NPROC": "2"}]))
    environment = dict(environment)
    thread_pool.fix(thread_pool.LEAST, environment)  # before the experiment is known
    thread_pool.fix(thread_pool.canonical_size(shards), environment)
    with cores(usable), warnings.catch_warnings(action="error"):
        assert thread_pool.size(devices, environment) == max(8, shards)
        thread_pool.check(shards, devices, environment)


def test_the_number_of_the_user_is_kept():
    environment = {"PJRT_NPROC": "32"}
    thread_pool.fix(8, environment)
    assert environment == {"PJRT_NPROC": "32"}
    thread_pool.check(8, 1, environment)


@pytest.mark.parametrize(
    ("usable", "environment", "devices"), [(2, {}, 1), (64, {}, 8), (2, {"PJRT_NPROC": "4"}, 1), (2, {"NPROC": "2"}, 4)]
)
def test_bits_that_belong_to_the_machine_or_its_devices_are_told(usable, environment, devices):
    with cores(usable), pytest.warns(UserWarning, match="set PJRT_NPROC=8 before JAX starts"):
        thread_pool.check(8, devices, environment)

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxdist import testing

TREE = {"a": np.arange(3, dtype=np.float32), "b": [np.int32(4), jax.random.key(0)]}


def changed(**leaves):
    return TREE | leaves


def test_equal_trees_pass_and_keys_are_compared_by_their_data():
    testing.assert_trees_equal(TREE, changed(b=[np.int32(4), jax.random.key(0)]))
    with pytest.raises(AssertionError, match=r"b/1: "):
        testing.assert_trees_equal(TREE, changed(b=[np.int32(4), jax.random.key(1)]))


def test_equality_is_of_bits_not_of_values():
    zero, nan = np.zeros(1, np.float32), np.full(1, np.nan, np.float32)
    testing.assert_trees_equal({"x": nan}, {"x": nan})
    with pytest.raises(AssertionError, match="x: "):
        testing.assert_trees_equal({"x": zero}, {"x": -zero})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (np.arange(3, dtype=np.float64), r"a: float32\(3,\) against float64\(3,\)"),
        (np.arange(4, dtype=np.float32), r"a: float32\(3,\) against float32\(4,\)"),
        (np.array([0, 1, 2.5], np.float32), r"a: largest difference 0.5"),
    ],
)
def test_the_leaf_that_differs_is_named_with_what_differs(other, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_trees_close(TREE, changed(a=other), tolerance=0.1)


def test_close_allows_the_tolerance_and_no_more():
    other = changed(a=TREE["a"] + np.float32(0.25))
    testing.assert_trees_close(TREE, other, tolerance=0.25)
    with pytest.raises(AssertionError, match="a: "):
        testing.assert_trees_close(TREE, other, tolerance=0.24)
    assert testing.largest_difference(TREE["a"], other["a"]) == 0.25


def test_nan_is_close_to_nothing():
    with pytest.raises(AssertionError, match="a: "):
        testing.assert_trees_close(TREE, changed(a=np.full(3, np.nan, np.float32)), tolerance=1.0)


def test_other_structures_are_told_apart():
    with pytest.raises(AssertionError, match="different structures"):
        testing.assert_trees_equal({"a": 1}, {"b": 1})


def describe_job(scale):
    """Run in each process of `test_processes_see_each_other`."""
    total = jax.jit(jnp.sum)(
        jax.device_put(
            np.arange(4.0) * scale,
            jax.sharding.NamedSharding(jax.make_mesh((4,), ("data",)), jax.sharding.PartitionSpec("data")),
        )
    )
    return {
        "process": jax.process_index(),
        "devices": [jax.local_device_count(), jax.device_count()],
        "total": float(total),
        "marker": os.environ["MARKER"],
    }


def fail_in_process_one():
    """Run in each process of `test_the_message_of_the_process_that_failed_is_shown`."""
    if jax.process_index() == 1:
        raise ValueError("process one has had enough")
    # Waits for a process that will never come.
    multihost_utils.sync_global_devices("never")


def test_processes_see_each_other_and_their_results_come_back_in_order():
    results = testing.run_processes(describe_job, 10, processes=2, devices=2, environment={"MARKER": "here"})
    assert [result.pop("process") for result in results] == [0, 1]
    assert results == 2 * [{"devices": [2, 4], "total": 60.0, "marker": "here"}]


def test_the_message_of_the_process_that_failed_is_shown_and_the_others_end():
    with pytest.raises(testing.ProcessFailed, match=r"Process 1 of 2 failed first(.|\n)*process one has had enough"):
        testing.run_processes(fail_in_process_one, processes=2, devices=1)

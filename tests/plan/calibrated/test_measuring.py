"""Times of operations out of the profiler's traces."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
import tiny_experiment

from jaxdist.errors import UserError
from jaxdist.plan.calibrated import measuring
from jaxdist.plan.compiled import operations


def trace_of(*events):
    return gzip.compress(json.dumps({"traceEvents": list(events)}).encode())


def test_the_median_of_all_devices_and_times_counts():
    dots = [{"ph": "X", "dur": duration, "args": {"hlo_op": "dot.1"}} for duration in (5, 7, 900)]
    other = [{"ph": "M", "dur": 1, "args": {"hlo_op": "dot.1"}}, {"ph": "X", "dur": 1}, {"ph": "M"}]
    first, second = trace_of(*dots[:1]), trace_of(*dots[1:], *other)
    assert measuring.operation_seconds({first: 1.0, second: 1.0}) == {"dot.1": 7e-6}
    assert measuring.operation_seconds({first: 1.0, second: 2.0}) == pytest.approx({"dot.1": 5e-6})


def test_a_real_trace_names_the_operations_of_the_program():
    step = jax.jit(lambda x: (x @ x).sum())
    x = jnp.ones((64, 64))
    step(x).block_until_ready()
    found = measuring.operation_seconds({measuring.trace(lambda: step(x).block_until_ready()): 1.0})
    names = {each.name for each in operations.operations(step.lower(x).compile().as_text())}
    assert names <= set(found)
    assert min(found.values()) > 0


def test_a_profiler_that_names_nothing_is_a_message(monkeypatch):
    monkeypatch.setattr(measuring, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "trace", lambda work: trace_of())
    step = measuring.RunningStep(tiny_experiment.get_config(), jax.devices()[:1])
    step.turn()
    measured = step.measured([1.0])
    assert (measured.operations, measured.seconds) == ([], [])
    assert measured.step_seconds == step.seconds[0] > 0
    assert step.measured([2.0]).step_seconds == step.seconds[0] / 2
    assert measured.held_bytes > measured.temp_bytes > 0
    step.turn(traced=True)
    with pytest.raises(UserError, match="Leave --calibrate out"):
        step.measured([1.0, 1.0])


def test_a_slower_round_is_told_by_all_programs_and_an_outlier_is_not_taken_for_it():
    assert measuring.paces([1.0, 2.0, 3.0], [[1.0, 1.5], [2.0, 3.0], [30.0, 4.5]]) == [1.0, 1.5]

"""Two processes whose signals and clocks differ must still decide the same."""

import itertools
import time
import types

import jax

from jaxdist import testing
from jaxdist.launch.joining import agreement
from jaxdist.run import recovery


def stops_and_clocks():
    """Have process 1 alone ask to stop after step 20; its clock goes ten times as fast. Return the steps and clocks."""
    process = jax.process_index()
    clocks, runs = [], []
    for _ in range(2):  # a second run must not read what the first one agreed on
        with agreement.of_job() as agreed:
            seconds = agreed.number("seconds", 0.5)
            stop_requested = agreed.stop(lambda step: process == 1 and step >= 20)
            agreed.meet("start")
            for step in itertools.count(1):
                time.sleep(0.01 * (1 + process))
                clocks.append(seconds(step * (1.0 + 9.0 * process)))
                if stop_requested(step):
                    break
            runs.append(step)
    return runs, clocks


def test_all_processes_stop_at_one_step_and_have_one_clock():
    ours, theirs = testing.run_processes(stops_and_clocks)
    assert ours == theirs
    runs, clocks = ours
    assert all(step > 20 for step in runs)
    # What process 0 said, which counts steps, and never far from the present one.
    assert clocks[:4] == [0.5, 0.5, 1.0, 2.0]
    assert all(clock in range(1, step + 1) for step, clock in enumerate(clocks[2 : runs[0]], start=2))


def snapshot_steps():
    """Take snapshots that cost process 0 half a step and process 1 nothing, for 2 % of the time."""
    taken = []
    with agreement.of_job() as agreed:
        paced = recovery.Paced(
            lambda info: taken.append(info.step),
            cost_seconds=lambda: 0.5 if jax.process_index() == 0 else 0.0,
            step_seconds=lambda: 1.0,
            agreed=agreed.number("snapshot interval", 1.0),
            share=0.02,
        )
        stop_requested = agreed.stop(lambda step: False)
        for step in range(1, 60):
            paced(types.SimpleNamespace(step=step))
            assert not stop_requested(step)
    return taken


def test_all_processes_take_their_snapshots_at_the_same_steps():
    assert testing.run_processes(snapshot_steps) == [[1, 2, 3, 28, 53]] * 2

"""Two processes whose signals and clocks differ, and that must do the same all the same."""

import types

import jax

from jaxdist import testing
from jaxdist.launch.joining import agreement
from jaxdist.run import recovery

NUM_STEPS = 6


def stops_and_clocks():
    """Ask process 1 alone to stop after step 3; its clock goes ten times as fast."""
    process = jax.process_index()
    step_now = [0]
    stop_requested = agreement.agreed_stop(lambda: process == 1 and step_now[0] >= 3)
    agreed_seconds = agreement.agreed_number(0.5)
    stops, clocks = [], []
    for step in range(1, NUM_STEPS + 1):
        step_now[0] = step
        clocks.append(agreed_seconds(step * (1.0 + 9.0 * process)))
        stops.append(stop_requested(step))
    return stops, clocks


def test_all_processes_stop_at_one_step_and_have_one_clock():
    expected = [[False, False, False, True, True, True], [0.5, 1.0, 2.0, 3.0, 4.0, 5.0]]
    assert testing.run_processes(stops_and_clocks) == [expected, expected]


def test_one_process_goes_by_its_own():
    stop = []
    stop_requested = agreement.agreed_stop(lambda: bool(stop))
    assert not stop_requested(1)
    stop.append("now")
    assert stop_requested(2)
    assert agreement.agreed_number(0.0)(7.25) == 7.25


def snapshot_steps():
    """Take snapshots that cost process 0 half a step and process 1 nothing, for 2 % of the time."""
    taken = []
    paced = recovery.Paced(
        lambda info: taken.append(info.step),
        cost_seconds=lambda: 0.5 if jax.process_index() == 0 else 0.0,
        step_seconds=lambda: 1.0,
        agreed=agreement.agreed_number(1.0),
        share=0.02,
    )
    for step in range(1, 60):
        paced(types.SimpleNamespace(step=step))
    return taken


def test_all_processes_take_their_snapshots_at_the_same_steps():
    assert testing.run_processes(snapshot_steps) == [[1, 2, 27, 52]] * 2

"""Agreement as pure logic: processes that run in any order, with clocks and wishes of their own, decide alike."""

import ast
import contextlib
import itertools
import pathlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxdist
from jaxdist.launch.joining import agreement

PACKAGE = pathlib.Path(jaxdist.__file__).parent


class Store:
    """What process 0 has published, and whether a stop was asked for; `hidden` requests are not seen yet."""

    def __init__(self):
        self.decisions, self.requests, self.hidden = [], 0, 0

    def channel(self):
        return Channel(self)


class Channel:
    """One process's view: its next decision is the one after the last it read."""

    def __init__(self, store):
        self.store, self.read = store, 0

    def publish(self, decision):
        self.store.decisions.append(decision)

    def is_there(self):
        return self.read < len(self.store.decisions)

    def receive(self):
        self.read += 1
        return self.store.decisions[self.read - 1]

    def ask(self):
        self.store.hidden += 1

    def asked(self):
        return self.store.requests > 0

    def meet(self, name):
        raise AssertionError("no process waits for all others while it trains")


class Process:
    """A process that trains: what it saw at each step, and whether it has stopped."""

    def __init__(self, number, channel, wants_from, step_seconds, first_step):
        self.now, self.step, self.stopped, self.seen = 0.0, first_step, False, []
        self.channel, self.step_seconds = channel, step_seconds
        self.agreed = agreement.Shared(channel, decides=number == 0, clock=lambda: self.now)
        self.seconds = self.agreed.number("seconds", -1.0)
        self.stop_requested = self.agreed.stop(lambda step: wants_from is not None and step >= wants_from)

    def can_move(self):
        return not self.stopped and (not self.agreed.due(self.step + 1) or self.channel.is_there())

    def move(self):
        self.step += 1
        self.now += self.step_seconds
        self.seen.append((self.step, self.seconds(self.now)))
        self.stopped = self.stop_requested(self.step)


STEPS = st.integers(1, 200)


@given(
    wants=st.lists(st.none() | STEPS, min_size=2, max_size=4).filter(any),
    step_seconds=st.lists(st.sampled_from([1e-3, 0.02, 1.0]), min_size=4, max_size=4),
    first_step=st.sampled_from([0, 17]),
    order=st.lists(st.integers(0, 4), max_size=300),
)
def test_in_any_order_all_stop_at_one_step_and_see_the_same_numbers_at_each(wants, step_seconds, first_step, order):
    store = Store()
    processes = [
        Process(number, store.channel(), want, step_seconds[number], first_step) for number, want in enumerate(wants)
    ]
    # The given order, then all in turn: every process continues, and every request is seen in the end.
    for chosen in itertools.chain(order, itertools.cycle(range(5))):
        if chosen == 4:
            store.requests, store.hidden = store.requests + store.hidden, 0
        elif chosen < len(processes) and processes[chosen].can_move():
            processes[chosen].move()
        if all(process.stopped for process in processes):
            break
        assert any(process.can_move() for process in processes), "they wait for each other"
    assert len({process.step for process in processes}) == 1
    assert len({tuple(process.seen) for process in processes}) == 1
    first_wish = min(want for want in wants if want is not None)
    assert processes[0].step > max(first_wish, first_step)


def test_a_wish_of_process_0_is_met_one_step_later_where_steps_are_long():
    process = Process(0, Store().channel(), wants_from=30, step_seconds=10.0, first_step=0)
    while not process.stopped:
        process.move()
    assert process.step == 31


def test_where_steps_are_short_decisions_are_a_quarter_of_a_second_apart():
    store = Store()
    process = Process(0, store.channel(), wants_from=None, step_seconds=0.001, first_step=0)
    for _ in range(3000):
        process.move()
    assert len(store.decisions) == pytest.approx(3000 * 0.001 / agreement.EVERY_SECONDS + agreement._WINDOW, abs=2)


def test_a_burst_of_dispatches_does_not_put_the_next_decision_far_away():
    """The host runs ahead of the devices by eight steps: what they take tells nothing about the ones to come."""
    store = Store()
    process = Process(0, store.channel(), wants_from=None, step_seconds=1e-6, first_step=0)
    for _ in range(8):
        process.move()
    process.step_seconds = 10.0
    for _ in range(40):
        process.move()
    assert [decision.next_after for decision in store.decisions] == 48 * [1]


def test_alone_a_process_goes_by_its_own():
    with agreement.of_job() as agreed:
        agreed.meet("start")
        wanted = agreed.stop(lambda step: step == 2)
        assert [wanted(step) for step in (1, 2, 3)] == [False, True, False]
        assert agreed.number("seconds", 0.0)(7.25) == 7.25


def test_no_module_runs_a_collective_over_devices_other_than_those_of_the_step():
    """Such a program and the step can wait for each other (docs/guide/processes.md).

    `spmd/mesh.py` makes the mesh of the job; a worker's island is one process; the first meeting ends before training.
    """
    makes_meshes, meets = set(), set()
    for path in PACKAGE.rglob("*.py"):
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {name.split(".")[-1] for name in calls}
        makes_meshes |= {str(path.relative_to(PACKAGE))} if names & {"Mesh", "make_mesh"} else set()
        meets |= names & {"sync_global_devices", "process_allgather", "broadcast_one_to_all", "assert_equal"}
    assert meets == set()
    assert {name for name in makes_meshes if name.startswith(("launch/", "checkpoint/", "rundir/", "guards/"))} == {
        "launch/joining/runtime.py"
    }


class BusyStore:
    """A coordinator's store that holds a request; while one decision is written, training makes the next."""

    def __init__(self):
        self.publish, self.number_written, self.rests = None, 0, threading.Event()

    def key_value_set(self, key, value):
        self.number_written += 1
        if self.number_written < 50:
            self.publish(agreement.Decision(False, {}, 1))
        else:
            self.rests.set()

    def key_value_delete(self, key):
        pass

    def key_value_dir_get(self, prefix):
        return [(f"{prefix}1", "")]


def test_a_request_is_seen_between_decisions_that_leave_no_pause():
    store, seen_after = BusyStore(), []
    with contextlib.closing(agreement.StoreChannel(store, "job", process=0)) as channel:

        def publish(decision):
            seen_after.append(channel.asked())
            channel.publish(decision)

        store.publish = publish
        channel.publish(agreement.Decision(False, {}, 1))
        assert store.rests.wait(60)
    assert any(seen_after)

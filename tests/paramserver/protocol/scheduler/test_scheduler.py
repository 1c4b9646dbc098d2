"""The scheduler as a whole: what it repeats, and what a step costs with many workers."""

import sys

import stages

from jaxdist.paramserver.protocol.scheduler.scheduler import AwakeClock


def test_the_clock_advances_by_what_it_could_observe():
    clock = AwakeClock(0.5)
    times = [clock.advance(now) for now in (10.0, 10.2, 110.2, 110.3, 5.0, 5.1)]
    assert [round(t, 3) for t in times] == [10.0, 10.2, 10.7, 10.8, 10.8, 10.9]


def test_a_term_that_a_shard_did_not_enter_is_announced_again():
    cast = stages.Cast(stages.settings(servers=2)).join()
    cast.state.acks.pop(1)
    sent = []
    for _ in range(4):
        sent += cast.tick(0.5)[0]
    assert {to for to, message in sent if type(message).__name__ == "Membership"} == {"server/1/a"}


def test_leases_leave_before_the_commit_of_the_step_before():
    """Each message costs the scheduler the time to wake a process, and workers wait for nothing but their leases."""
    cast = stages.Cast(stages.settings(workers=2, servers=2)).join()
    leases = [cast.ask(0), cast.ask(1)]
    cast.finish(1, leases[1])
    sent, _ = cast.finish(0, leases[0])
    assert [type(message).__name__ for _, message in sent] == ["DoneAck", "Grant", "Grant", "Commit", "Commit"]


def lines_a_step(workers):
    """Return how many lines run in a step, turns of loops within a line too: a time would depend on the machine."""
    chosen = stages.settings(
        workers=workers, servers=16, global_batch_size=workers, num_examples=100 * workers, max_steps=1000
    )
    cast = stages.Cast(chosen).join()
    cast.step()
    count, before = 0, sys.gettrace()

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        cast.step()
    finally:
        sys.settrace(before)
    return count


def test_the_work_of_a_step_grows_with_the_workers_and_not_with_their_square():
    """Eight times the workers: eight times the work; squared it would be 64 times."""
    assert lines_a_step(256) < 9 * lines_a_step(32)

"""The history of a process: sums over bins that grow, the last leases, and the events of the membership."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.paramserver.processes import lease_history
from jaxdist.paramserver.processes.run_folder import HISTORY_NAME
from jaxdist.paramserver.protocol import effects, journal, messages


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 100)), min_size=1, max_size=30))
def test_however_long_a_run_is_the_bins_are_few_and_lose_nothing(spans):
    bins = lease_history.Bins(1000.0)
    for since, seconds in spans:
        bins.add("steps", 1000.0 + since)
        bins.add_span("busy", 1000.0 + since, 1000.0 + since + seconds)
    assert max(map(len, bins.series.values())) <= lease_history.MOST_BINS
    assert sum(bins.series["steps"]) == len(spans)
    assert sum(bins.series.get("busy", ())) == pytest.approx(sum(seconds for _, seconds in spans), rel=1e-6, abs=1e-6)


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def lease(step, part=0):
    return messages.Lease(step, part, 0, 0, 8)


def grant(worker, incarnation, sequence, step):
    return effects.Send(f"worker/{worker}", messages.Grant(worker, incarnation, 1, sequence, 0, lease(step)))


def membership(term, members, primary="server/0/a", backup="server/0/b", restore_term=1):
    rows = tuple(messages.Member(worker, incarnation, 0) for worker, incarnation in members)
    place = messages.ShardPlace(primary, 1, backup, 1 if backup else 0, bool(backup))
    return messages.Membership(term, rows, (place,), restore_term, "")


def record(*arguments, **keywords):
    return [effects.Append(journal.MembershipRecord(membership(*arguments, **keywords), 1, (), None))]


def test_the_scheduler_records_who_held_which_lease_and_what_became_of_it(tmp_path):
    clock = Clock()
    history = lease_history.History("scheduler", tmp_path, clock)
    watch = lease_history.SchedulerWatch(history, None)
    watch.look(messages.Tick(), [], record(1, []))
    watch.look(messages.Tick(), [], record(2, [(0, 1), (1, 2)]))
    watch.look(messages.Tick(), [grant(0, 1, 1, 5), grant(1, 2, 1, 5)], [])
    clock.now += 2
    watch.look(messages.Tick(), [grant(1, 2, 1, 5)], [])  # sent again
    watch.look(messages.Done(0, 1, 1, 0, lease(5), 8.0, True, ()), [], [])
    clock.now += 1
    watch.look(messages.Tick(), [], record(3, [(0, 1)], primary="server/0/b", backup=""))
    watch.look(messages.Done(1, 2, 1, 0, lease(5), 8.0, True, ()), [], [])  # of a worker that has left
    assert list(history.leases) == [[0, 5, 0, 1000.0, 1002.0, "done"]]
    assert list(history.lost) == [[1, 5, 0, 1000.0, 1003.0, "lost"]]
    assert [(kind, text) for _, kind, text in history.events] == [
        ("join", "worker 0 joined"),
        ("join", "worker 1 joined"),
        ("leave", "worker 1 left"),
        ("failover", "shard 0: server/0/b took over"),
    ]
    assert sum(history.bins.series["again"]) == 1
    assert sum(history.bins.series["worker/1"]) == pytest.approx(3.0)
    watch.look(messages.Tick(), [], record(4, [(0, 7)], primary="server/0/b", backup="", restore_term=4))
    assert [text for _, _, text in history.events[4:]] == ["worker 0 restarted", "returned to the last saved cut"]


class FakeWorker:
    """What the history reads of a worker."""

    def __init__(self):
        self.phase, self.worker, self.sequence, self.lease = "asking", 3, 1, None


def test_a_worker_records_its_phases_and_the_requests_that_it_sent_again(tmp_path):
    clock, machine = Clock(), FakeWorker()
    history = lease_history.History("worker/3", tmp_path, clock)
    watch = lease_history.WorkerWatch(history, machine)
    pull = effects.Send("server/0/a", messages.Pull(0, 3, 1, 1, 0, 0))

    def done(*, staged):
        return effects.Send("scheduler", messages.Done(3, 1, 1, 0, lease(9, 2), 8.0, True, (), staged))

    def enter(phase, seconds, replies=()):
        clock.now += seconds
        machine.phase = phase
        watch.look(messages.Tick(), list(replies), [])

    machine.lease = lease(9, 2)
    enter("pulling", 1.0, [pull])
    enter("pulling", 0.5, [pull])
    enter("computing", 0.5)
    enter("pushing", 4.0, [done(staged=False)])
    enter("reporting", 0.25, [done(staged=True)])  # says more than the first, and is not that again
    enter("asking", 0.125)
    assert list(history.leases) == [[3, 9, 2, 1001.0, 1.0, 4.0, 0.25]]
    assert {name: sum(row) for name, row in history.bins.series.items()} == pytest.approx(
        {"asking": 1.0, "again": 1.0, "pulling": 1.0, "computing": 4.0, "pushing": 0.25, "reporting": 0.125}
    )
    enter("pulling", 1.0)
    enter("asking", 1.0)  # the step was committed without it
    assert history.leases[-1] == [3, 9, 2, 1002.375 + 5.0, 1.0, 0.0, 0.0]


def test_a_restarted_process_continues_the_history(tmp_path):
    clock = Clock()
    history = lease_history.History("scheduler", tmp_path, clock)
    history.note("join", "worker 0 joined")
    history.bins.add("steps", clock())
    for number in range(3 * lease_history.MOST_LEASES):
        history.leases.append([0, number, 0, 1000.0, 1001.0, "done"])
    history.events += [[1000.0, "join", "again"]] * lease_history.MOST_EVENTS
    history.note("leave", "too many")
    history.look(now=True)
    path = tmp_path / HISTORY_NAME / "scheduler.json"
    assert path.stat().st_size < 50_000
    again = lease_history.History("scheduler", tmp_path, clock)
    assert again.continues
    assert (list(again.leases), again.events, again.omitted) == (list(history.leases), history.events, 1)
    assert len(again.leases) == lease_history.MOST_LEASES
    assert again.bins.series == history.bins.series
    path.write_text("{")
    assert not lease_history.History("scheduler", tmp_path, clock).continues


def test_an_event_is_in_the_file_at_once(tmp_path):
    """What it tells of may be a fault that kills this process, too."""
    history = lease_history.History("scheduler", tmp_path, Clock())
    history.look(now=True)
    history.note("failover", "shard 0: server/0/b took over")
    history.look()
    assert len(lease_history.History("scheduler", tmp_path, Clock()).events) == 1


def test_an_attempt_after_the_clock_was_set_back_follows_the_attempt_before(tmp_path):
    clock = Clock()
    history = lease_history.History("scheduler", tmp_path, clock)
    history.bins.add("steps", history.clock())
    history.look(now=True)
    clock.now -= 900
    again = lease_history.History("scheduler", tmp_path, clock)
    clock.now += 5
    again.note("join", "worker 0 joined")
    assert again.events == [[1005.0, "join", "worker 0 joined"]]

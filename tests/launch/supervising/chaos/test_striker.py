"""Delivering strikes in their order, to a job that the test makes up."""

import subprocess
import sys

from jaxdist.launch.supervising.chaos import striker, strikes


class Job:
    """A job that is due at once, recovers at the third look, and has the size that was asked for."""

    def __init__(self, process_id):
        self.process_id, self.looks, self.sizes, self.course = process_id, 0, [], []

    def target(self, strike):
        return striker.Target(self.process_id, lambda: self.recover(strike))

    def recover(self, strike):
        for _ in range(2):
            self.looks += 1
            yield None
        yield strikes.Hit(strike, 0.5, struck="worker/1")

    def has_size(self, num_processes):
        self.sizes.append(num_processes)
        return True

    def hold(self, num_processes):
        self.course.append("held")
        try:
            for _ in range(3):
                self.course.append(num_processes)
                yield False
            while True:
                yield True
        finally:
            self.course.append("continues")


class Commands:
    def __init__(self, looks=1):
        self.asked, self.looks = [], looks

    def change(self, count, *, joins):
        self.asked.append((count, joins))
        left = iter([False] * self.looks)
        return lambda: next(left, True)


def deliver(job, *planned):
    commands = Commands()
    with striker.Striker(job, planned, commands, size=2) as struck:
        struck._thread.join(200)
    assert struck.changes == len(commands.asked)
    return struck.hits, commands.asked


def test_each_strike_waits_for_the_recovery_from_the_one_before():
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    kill = strikes.Strike("kill", 1, 3)
    hits, asked = deliver(Job(victim.pid), kill)
    assert (victim.wait(200), asked) == (-9, [])
    assert [(hit.strike, hit.seconds, hit.struck) for hit in hits] == [(kill, 0.5, "worker/1")]
    assert deliver(Job(victim.pid), kill) == ([], [])  # it had ended by itself


def test_as_many_join_and_leave_as_are_missing():
    job = Job(0)
    changes = [
        strikes.Strike(kind, 0, 1, num_processes=count) for kind, count in (("join", 4), ("leave", 2), ("leave", 1))
    ]
    assert deliver(job, *changes) == ([], [(2, True), (2, False), (1, False)])
    assert job.sizes == [4, 2, 1]
    # It is held until they are about to: a short one would end before.
    assert job.course == [each for size in (4, 2, 1) for each in ("held", *[size] * 3, "continues")]


def test_a_change_that_is_impossible_does_not_hold_a_job_forever(monkeypatch):
    monkeypatch.setattr(striker, "HOLD_SECONDS", 0.0)
    job = Job(0)
    job.has_size = lambda num_processes: False
    with striker.Striker(job, [strikes.Strike("join", 0, 1, num_processes=4)], Commands(), size=2) as struck:
        while "continues" not in job.course:
            pass
    assert (struck.hits, struck.changes) == ([], 0)


def test_a_job_that_ends_ends_the_striker():
    job = Job(0)
    job.target = lambda strike: None
    with striker.Striker(job, [strikes.Strike("kill", 0, 99)], Commands(), size=2) as struck:
        pass
    assert struck.hits == []

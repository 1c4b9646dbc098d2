"""When the processes of the next attempt are made, used, replaced and given up."""

import os
import pathlib

import pytest

from jaxdist.errors import ExitStatus
from jaxdist.launch.supervising import roster
from jaxdist.launch.supervising.standby import reserve


class Process:
    def __init__(self):
        self.returncode = None

    def poll(self):
        return self.returncode


class Group:
    def __init__(self, count):
        self.processes, self.closed = [Process() for _ in range(count)], False

    def has_ended(self):
        return any(process.poll() is not None for process in self.processes)

    def close(self):
        self.closed = True


class Job:
    def __init__(self, number, count):
        self.number, self.group, self.ready = number, Group(count), False

    def is_ready(self):
        return self.ready


class Member:
    lost = False

    def __init__(self, num_processes):
        self.num_processes = num_processes

    def start(self, command, environment, output):
        raise AssertionError


@pytest.fixture
def now(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(reserve.time, "monotonic", lambda: clock[0])
    return clock


class Bench:
    """A reserve without its thread, the roster that it looks at, what it made and how often it asked."""

    def __init__(self, memory, own=2):
        self.memory, self.made, self.asked, self.error = memory, [], 0, None
        self.roster = roster.Roster(own, lambda *_: None, lambda: self.reserve.change())
        self.reserve = reserve.Reserve(memory, self.roster, self.make, self.ask, sparing=False)
        self.roster.begin(own)
        self.reserve.watch(0, list(range(own)))

    def make(self, number, starters):
        if self.error:
            raise self.error
        self.made.append(Job(number, len(starters)))
        return self.made[-1]

    def ask(self):
        self.asked += 1

    def look(self):
        self.reserve.look(self.reserve._watched)

    def make_steps(self, now, startup=2.0):
        now[0] += startup
        (self.memory / reserve.WANTED_NAME).touch()
        self.look()


@pytest.mark.parametrize(
    ("number", "wanted", "now", "due"),
    [
        (0, None, 1e9, False),
        (0, 102.0, 103.9, False),
        (0, 102.0, 104.0, True),
        (0, 160.0, 164.9, False),
        (0, 160.0, 165.0, True),
        (1, None, 1e9, False),
        (1, 102.0, 102.0, True),
    ],
)
def test_it_is_made_once_the_first_attempt_has_run_as_long_as_it_took_to_start_later_at_once(number, wanted, now, due):
    assert reserve.is_due(number=number, now=now, started=100.0, wanted=wanted) == due


def test_the_next_attempt_takes_it(tmp_path, now):
    bench = Bench(tmp_path)
    bench.make_steps(now)
    assert not bench.made
    now[0] += 2.0
    bench.look()
    bench.look()
    [job] = bench.made
    assert (job.number, len(job.group.processes)) == (1, 2)
    bench.roster.end()
    bench.roster.begin(2)
    assert bench.reserve.take(bench.roster.running()) is job
    assert not job.group.closed
    assert not (tmp_path / reserve.WANTED_NAME).exists()
    assert bench.reserve.take(bench.roster.running()) is None


@pytest.mark.parametrize("reason", ["ended", "other processes", "no record"])
def test_one_that_does_not_fit_the_next_attempt_is_ended(tmp_path, now, reason):
    bench = Bench(tmp_path)
    bench.make_steps(now)
    now[0] += 2.0
    bench.look()
    if reason == "ended":
        bench.made[0].group.processes[1].returncode = -9
    if reason == "other processes":
        bench.roster.lower(1)
    bench.roster.end()
    bench.roster.begin(bench.roster.target())
    assert bench.reserve.take([] if reason == "no record" else bench.roster.running()) is None
    assert bench.made[0].group.closed


def test_one_that_ends_is_made_again_a_few_times(tmp_path, now, capsys):
    bench = Bench(tmp_path)
    bench.make_steps(now)
    now[0] += 2.0
    for _ in range(9):
        bench.look()
        bench.made[-1].group.processes[0].returncode = 1
    assert len(bench.made) == 3
    assert "No processes are kept in reserve any more: a process ended with status 1." in capsys.readouterr().err


def test_one_that_cannot_be_started_is_no_failure_of_the_job(tmp_path, now):
    bench = Bench(tmp_path)
    bench.error = OSError(12, "Cannot allocate memory")
    bench.make_steps(now)
    now[0] += 2.0
    bench.look()
    assert bench.reserve.take(bench.roster.running()) is None


def test_a_change_waits_for_processes_that_are_ready(tmp_path, now):
    bench = Bench(tmp_path)
    bench.make_steps(now)
    bench.roster.add(Member(2))
    bench.look()
    assert (bench.asked, [len(job.group.processes) for job in bench.made]) == (0, [4])
    bench.made[0].ready = True
    bench.look()
    bench.look()
    assert bench.asked == 1
    bench.roster.end()
    bench.roster.begin(4)
    assert bench.reserve.take(bench.roster.running()) is bench.made[0]


def test_a_change_replaces_the_processes_for_the_old_number(tmp_path, now):
    bench = Bench(tmp_path)
    bench.make_steps(now)
    now[0] += 2.0
    bench.look()
    bench.roster.lower(1)
    bench.look()
    assert [len(job.group.processes) for job in bench.made] == [2, 1]
    assert [job.group.closed for job in bench.made] == [True, False]


def test_a_change_is_not_held_up_for_long(tmp_path, now):
    bench = Bench(tmp_path)
    bench.make_steps(now)
    bench.roster.add(Member(2))
    bench.look()
    now[0] += reserve.CHANGE_SECONDS
    bench.look()
    assert bench.asked == 1


def test_before_the_job_makes_steps_a_change_is_not_held_up(tmp_path, now):
    bench = Bench(tmp_path)
    bench.roster.add(Member(2))
    assert bench.asked == 1


def test_a_number_of_processes_that_does_not_suit_is_found_without_ending_the_attempt(tmp_path, now, capsys):
    bench = Bench(tmp_path)
    bench.make_steps(now)
    bench.roster.add(Member(1))
    bench.look()
    bench.made[0].group.processes[0].returncode = ExitStatus.USER
    bench.look()
    bench.look()
    assert (bench.asked, bench.roster.target()) == (0, 2)
    assert "cannot be trained by 3 processes" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "enough"), [(10_000_000, True), (100, False)])
def test_it_needs_memory_for_as_many_processes_again(tmp_path, free, enough):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "statm").write_text("9000 5000 1000 1 0 2 0")
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {free} kB\n")
    assert reserve.has_room([7], root=tmp_path) == enough
    assert not reserve.has_room([8], root=tmp_path)


def test_the_memory_of_this_process_is_found():
    assert isinstance(reserve.has_room([os.getpid()]), bool)
    assert pathlib.Path(f"/proc/{os.getpid()}/statm").exists()


def test_its_thread_ends_and_drops_what_is_left(tmp_path):
    bench = Bench(tmp_path)
    with bench.reserve:
        bench.reserve._job = job = Job(1, 2)
        bench.reserve._watched = None
    assert job.group.closed

"""The plan of a chaos run, and what each kind of strike does to a process."""

import collections
import os
import signal
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from jaxdist.launch.supervising import stopped
from jaxdist.launch.supervising.chaos import strikes

COUNTS = st.integers(0, 12)


@given(
    seed=st.integers(0, 99),
    processes=st.integers(1, 4),
    steps=st.integers(1, 50),
    counts=st.tuples(COUNTS, COUNTS, COUNTS),
)
def test_a_plan_is_a_pure_function_that_gives_every_process_its_turn(seed, processes, steps, counts):
    settings = {"num_processes": processes, "num_steps": steps} | dict(zip(("kills", "stops", "starves"), counts))
    planned = strikes.plan(seed, **settings)
    assert planned == strikes.plan(seed, **settings)
    kinds = collections.Counter(strike.kind for strike in planned)
    assert (kinds["kill"], kinds["stop"], kinds["starve"]) == counts
    assert [strike.step for strike in planned] == sorted(strike.step for strike in planned)
    assert all(1 <= strike.step <= max(1, steps - 1) for strike in planned)
    assert not planned or 0 in {strike.process for strike in planned}
    for begin in range(0, len(planned) - processes + 1, processes):
        assert {strike.process for strike in planned[begin : begin + processes]} == set(range(processes))


@given(seed=st.integers(0, 99), processes=st.sampled_from([1, 2, 4]), kills=COUNTS, changes=st.integers(0, 9))
def test_processes_join_and_leave_by_twos(seed, processes, kills, changes):
    settings = {"num_processes": processes, "num_steps": 50, "kills": kills}
    planned = strikes.plan(seed, **settings, joins=changes, leaves=changes)
    kinds = collections.Counter(strike.kind for strike in planned)
    assert (kinds["kill"], kinds["join"], kinds["leave"]) == (kills, changes, changes)
    for strike in planned:
        assert (strike.num_processes is not None) == (strike.kind in ("join", "leave"))
        if strike.num_processes is not None:
            before, processes = processes, strike.num_processes
            assert processes == (2 * before if strike.kind == "join" else before // 2)
            assert 1 <= processes <= max(4, 2 * settings["num_processes"])


def test_another_seed_is_another_plan():
    plans = [strikes.plan(seed, num_processes=2, num_steps=100, kills=5) for seed in range(3)]
    assert plans[0] != plans[1] != plans[2]


VICTIM = """
import sys
for line in sys.stdin:
    try:
        with open(sys.argv[1], "a") as file:
            file.write(line)
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


def test_each_kind_of_strike_does_what_it_says(tmp_path):
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def write():
        victim.stdin.write("line\n")
        victim.stdin.flush()
        return victim.stdout.readline()

    assert write() == "written\n"
    assert strikes.deliver(strikes.Strike("starve", 0, 1), victim.pid)
    assert write() == "File too large\n"
    assert strikes.deliver(strikes.Strike("stop", 0, 1), victim.pid)
    os.waitpid(victim.pid, os.WUNTRACED)
    assert stopped.is_stopped(victim.pid)
    assert strikes.deliver(strikes.Strike("kill", 0, 1), victim.pid)
    assert victim.wait(timeout=200) == -signal.SIGKILL
    assert not stopped.is_stopped(victim.pid)
    assert not strikes.deliver(strikes.Strike("kill", 0, 1), victim.pid)
    victim.stdin.close()
    victim.stdout.close()

"""The plan and the comparison, without processes; tests/multiprocess runs the real thing."""

import collections
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.launch.supervising import chaos, stopped
from jaxdist.rundir import ledger

COUNTS = st.integers(0, 12)


@given(
    seed=st.integers(0, 99),
    processes=st.integers(1, 4),
    steps=st.integers(1, 50),
    counts=st.tuples(COUNTS, COUNTS, COUNTS),
)
def test_a_plan_is_a_pure_function_that_gives_every_process_its_turn(seed, processes, steps, counts):
    settings = {"num_processes": processes, "num_steps": steps} | dict(zip(("kills", "stops", "starves"), counts))
    strikes = chaos.plan(seed, **settings)
    assert strikes == chaos.plan(seed, **settings)
    kinds = collections.Counter(strike.kind for strike in strikes)
    assert (kinds["kill"], kinds["stop"], kinds["starve"]) == counts
    assert [strike.step for strike in strikes] == sorted(strike.step for strike in strikes)
    assert all(1 <= strike.step <= max(1, steps - 1) for strike in strikes)
    for begin in range(0, len(strikes) - processes + 1, processes):
        assert {strike.process for strike in strikes[begin : begin + processes]} == set(range(processes))


@given(seed=st.integers(0, 99), processes=st.sampled_from([1, 2, 4]), kills=COUNTS, changes=st.integers(0, 9))
def test_processes_join_and_leave_by_twos(seed, processes, kills, changes):
    settings = {"num_processes": processes, "num_steps": 50, "kills": kills}
    strikes = chaos.plan(seed, **settings, joins=changes, leaves=changes)
    kinds = collections.Counter(strike.kind for strike in strikes)
    assert (kinds["kill"], kinds["join"], kinds["leave"]) == (kills, changes, changes)
    for strike in strikes:
        assert (strike.num_processes is not None) == (strike.kind in ("join", "leave"))
        if strike.num_processes is not None:
            before, processes = processes, strike.num_processes
            assert processes == (2 * before if strike.kind == "join" else before // 2)
            assert 1 <= processes <= max(4, 2 * settings["num_processes"])


def test_another_seed_is_another_plan():
    plans = [chaos.plan(seed, num_processes=2, num_steps=100, kills=5) for seed in range(3)]
    assert plans[0] != plans[1] != plans[2]


def write_ledger(run_dir, *lines):
    run_dir.mkdir()
    (run_dir / ledger.FILE_NAME).write_text("\n".join(["from 0", *lines, ""]))


def test_ledgers_are_held_to_each_other_and_to_the_data(tmp_path):
    write_ledger(tmp_path / "calm", "1 0 0 4", "2 0 4 8")
    write_ledger(tmp_path / "same", "1 0 0 4", "2 0 4 6", "from 1", "2 0 4 8")
    write_ledger(tmp_path / "lost", "1 0 0 4", "2 0 5 8")
    write_ledger(tmp_path / "other", "1 0 0 5", "2 0 5 8")
    compare = {
        name: chaos.compare_ledgers(tmp_path / "calm", tmp_path / name, num_examples=8)
        for name in ("same", "lost", "other")
    }
    assert compare["same"] == "exact"
    assert "were lost" in compare["lost"]
    assert "not in the steps" in compare["other"]


def make_report(**changes):
    lost = chaos.Lost(detect=0.25, restart=2.0, restore=0.5, compile=1.25)
    hit = chaos.Hit(chaos.Strike("kill", 0, 3), lost)
    values = {
        "planned": 2,
        "hits": [hit],
        "restarts": 1,
        "undisturbed": ("a", 9),
        "disturbed": ("a", 9),
        "ledger": "exact",
    }
    return chaos.ChaosResult(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"disturbed": ("b", 9)},
        {"disturbed": ("a", 8)},
        {"ledger": "lost"},
        {"undisturbed": (None, 9), "disturbed": (None, 9)},
    ],
)
def test_one_difference_is_enough(changes):
    assert make_report().identical
    assert str(make_report()).splitlines()[-1] == "identical"
    assert not make_report(**changes).identical
    assert str(make_report(**changes)).splitlines()[-1] == "NOT identical"


def test_the_report_says_what_was_done_and_what_it_cost():
    content = make_report().to_json()
    assert content["strikes"] == {"kill": 1, "stop": 0, "starve": 0}
    assert content["lost_seconds"] == {"p50": 4.0, "max": 4.0}
    assert content["split_seconds"]["restart"] == {"p50": 2.0, "max": 2.0}
    assert "of these    p50 detect 0.2, restart 2.0, restore 0.5, compile 1.2" in str(make_report())
    assert "1 kills, 0 stops, 0 starved of disk (1 of 2 planned)" in str(make_report())
    assert chaos.ChaosResult(0, [], 0, ("a", 1), ("a", 1), "exact").to_json()["lost_seconds"] == {
        "p50": 0.0,
        "max": 0.0,
    }


def test_the_report_says_whether_the_watchdog_named_the_stopped_process():
    lost = chaos.Lost(detect=5.0, restart=1.0, restore=0.0, compile=1.0)
    stop = chaos.Strike("stop", 1, 3)
    hits = [chaos.Hit(stop, lost, verdict) for verdict in (((1,), 4.0), ((0, 1), 6.0), ((0,), 5.0), None)]
    content = make_report(hits=[*hits, chaos.Hit(chaos.Strike("kill", 0, 5), lost)], planned=5).to_json()
    assert content["verdicts"] == {"right": 1, "of": 4}
    assert content["verdict_seconds"] == {"p50": 5.0, "max": 6.0}


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
    assert chaos._deliver(chaos.Strike("starve", 0, 1), victim.pid)
    assert write() == "File too large\n"
    assert chaos._deliver(chaos.Strike("stop", 0, 1), victim.pid)
    os.waitpid(victim.pid, os.WUNTRACED)
    assert stopped.is_stopped(victim.pid)
    assert chaos._deliver(chaos.Strike("kill", 0, 1), victim.pid)
    assert victim.wait(timeout=30) == -signal.SIGKILL
    assert not stopped.is_stopped(victim.pid)
    assert not chaos._deliver(chaos.Strike("kill", 0, 1), victim.pid)
    victim.stdin.close()
    victim.stdout.close()

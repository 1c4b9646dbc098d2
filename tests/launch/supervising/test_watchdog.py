"""The verdict without processes: a pure function of the last report of each process, and of its age."""

import re
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.launch.supervising import board, watchdog

LIMITS = watchdog.Limits(hang_seconds=100.0, slow_seconds=1000.0)


def view(step, phase, same, silent=0.0):
    return watchdog.View(step, phase, same, silent)


def judge(*views, limits=LIMITS):
    return watchdog.judge(dict(enumerate(views)), limits, silence_seconds=20.0)


def test_the_process_that_reads_is_blamed_not_those_that_wait_for_it():
    verdict = judge(
        view(812, "compute", 141), view(811, "compute", 141), view(812, "compute", 140), view(811, "input", 142)
    )
    assert verdict.culprits == (3,)
    assert "process 3 is in input for 142 s; the others wait in step 813" in verdict.text
    assert "  process 0: step 812, compute for 141 s" in verdict.text


def test_a_process_that_gives_no_sign_of_life_is_blamed_first_and_does_not_report():
    verdict = judge(view(7, "compute", 150, silent=150), view(7, "input", 150))
    assert verdict.culprits == (0,)
    assert verdict.reporter == 1
    assert "process 0: step 7, compute for 150 s, no report for 150 s" in verdict.text


def test_the_lowest_step_is_blamed_when_all_are_in_a_step():
    assert judge(view(6, "compute", 101), view(4, "compute", 101)).culprits == (1,)


def test_a_process_that_is_one_step_behind_in_a_step_is_not_blamed():
    verdict = judge(view(5, "compute", 101), view(4, "compute", 102))
    assert (verdict.culprits, verdict.reporter) == ((), 0)
    assert "every process is in a step, and all respond, so it is unclear which one the others wait for" in verdict.text
    assert "  process 1: step 4, compute for 102 s" in verdict.text


def test_a_slow_first_compile_is_no_stall_for_those_who_wait_for_it():
    assert judge(view(0, "compute", 900), view(0, "compile", 900)) is None
    assert judge(view(0, "compute", 1000), view(0, "compile", 1000)).culprits


def test_silence_is_a_stall_even_where_work_may_be_slow_but_not_before_the_first_report():
    compiles, waits = view(0, "compile", 120), view(0, "compute", 120)
    assert judge(waits, compiles) is None
    assert judge(waits, watchdog.View(0, "compile", 120, 101)).culprits == (1,)
    assert judge(waits, watchdog.View(0, "restart", 120, 120, heard=False)) is None


def test_a_process_that_is_done_does_not_hold_up_anybody():
    assert judge(view(9, "done", 500), view(9, "done", 500)) is None
    assert judge(view(9, "done", 500, silent=500), view(9, "input", 101)).culprits == (1,)


@given(
    views=st.lists(
        st.builds(
            watchdog.View,
            st.integers(0, 5),
            st.sampled_from(["input", "compute", "compile", "eval", "checkpoint", "done"]),
            st.floats(0, 2000),
            st.floats(0, 2000),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_nobody_is_blamed_who_is_within_the_limit_or_done(views):
    verdict = judge(*views)
    active = [each for each in views if each.phase != "done"]
    stopped = any(each.heard and each.silent_seconds >= LIMITS.hang_seconds for each in active)
    within = not stopped and any(each.same_seconds < LIMITS.of(each.phase) for each in active)
    assert (verdict is None) == (not active or within)
    if verdict:
        assert all(views[culprit].phase != "done" for culprit in verdict.culprits)
        assert views[verdict.reporter].phase != "done"


def test_the_observer_measures_by_its_own_clock():
    now = [0.0]
    observer = watchdog.ReportClock(1, clock=lambda: now[0])
    observer.note(0, board.ProcessReport(1, "input", 1))
    now[0] = 4.0
    observer.note(0, board.ProcessReport(1, "input", 2))
    now[0] = 6.0
    observer.note(0, None)
    assert observer.views() == {0: view(1, "input", 6.0, 2.0)}
    observer.note(0, board.ProcessReport(2, "input", 3))
    assert observer.views() == {0: view(2, "input", 0.0, 0.0)}


@given(st.lists(st.floats(0, 9), max_size=20), st.integers(0, 20))
def test_the_time_in_which_a_process_was_stopped_is_no_hang(gaps, when):
    now = [7.0]
    observer = watchdog.ReportClock(1, clock=watchdog.OwnTime(5.0, clock=lambda: now[0]))
    observer.note(0, board.ProcessReport(1, "compute", 1))
    for beat, gap in enumerate([*gaps[:when], 3600.0, *gaps[when:]], 2):
        now[0] += gap
        observer.note(0, board.ProcessReport(1, "compute", beat))
    assert observer.views()[0].same_seconds == pytest.approx(5.0 + sum(min(gap, 5.0) for gap in gaps))


def test_the_thread_reports_for_its_process_and_says_when_it_is_done(tmp_path):
    asked = threading.Semaphore(0)

    def where():
        asked.release()
        return 3, "input"

    dog = watchdog.Watchdog(tmp_path, process=0, num_processes=1, where=where, limits=LIMITS, every_seconds=0.001)
    with dog:
        for _ in range(3):
            asked.acquire()
        assert board.read(tmp_path, 0).phase == "input"
    assert board.read(tmp_path, 0).phase == watchdog.DONE


HANGING = """
import pathlib, sys, threading
from jaxdist.launch.supervising import watchdog
directory, process = pathlib.Path(sys.argv[1]), int(sys.argv[2])
watchdog.Watchdog(
    directory, process=process, num_processes=2, where=lambda: (5 - process, "input"),
    limits=watchdog.Limits(hang_seconds=1.0), every_seconds=0.1,
    on_hang=lambda verdict: (directory / f"reported-by-{process}").touch(),
).__enter__()
threading.Event().wait()
"""


def test_both_processes_of_a_hanging_job_show_one_table_and_their_stacks_and_end(tmp_path):
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True) for n in range(2)]
    ended = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75]
    tables = [text.partition("This process's stacks:")[0] for text in ended]
    assert tables[0] == tables[1]
    assert re.search(r"The job hangs: process 1 is in input for \d+ s; the others wait in step 6\.", tables[0])
    assert all('File "<string>", line 10 in <module>' in text for text in ended)
    assert [path.name for path in tmp_path.glob("reported-by-*")] == ["reported-by-0"]


@pytest.mark.parametrize("phase", ["input", "compute", "other"])
def test_limits_of_a_slow_phase_never_lie_below_those_of_a_quick_one(phase):
    limits = watchdog.Limits(hang_seconds=5000.0, slow_seconds=10.0)
    assert limits.of("compile") == limits.of(phase) == 5000.0

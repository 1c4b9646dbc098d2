"""Whether and how to continue after a failure, as a table."""

import dataclasses

import pytest

from jaxdist.config.experiment import Recovery
from jaxdist.launch.supervising import restart_policy
from jaxdist.launch.supervising.restart_policy import Attempt, End, Restart

KILLED = 137


def failed(saved_step, **changes):
    return Attempt(**{"num_processes": 4, "exit_status": KILLED, "saved_step": saved_step} | changes)


def test_after_progress_it_goes_on_at_once():
    assert restart_policy.decide([failed(7)], Recovery()) == Restart(0.0, 4)
    assert restart_policy.decide([failed(7), failed(8)], Recovery()) == Restart(0.0, 4)


def test_without_progress_it_backs_off_and_then_gives_up(monkeypatch):
    monkeypatch.setattr(restart_policy, "FIRST_DELAY_SECONDS", 2.0)
    monkeypatch.setattr(restart_policy, "LONGEST_DELAY_SECONDS", 7.0)
    settings = Recovery(max_fruitless=5)
    attempts = [failed(7)]
    delays = []
    for _ in range(4):
        attempts.append(failed(7))
        delays.append(restart_policy.decide(attempts, settings).delay_seconds)
    assert delays == [0.0, 2.0, 4.0, 7.0]
    end = restart_policy.decide([*attempts, failed(7)], settings)
    assert end.exit_status == KILLED
    assert "5 attempts in a row failed" in end.reason
    assert "newest saved step is 7" in end.reason


def test_a_step_of_an_earlier_job_is_no_progress_of_this_one():
    assert restart_policy.decide([failed(7)], Recovery(), start_step=7) == Restart(0.0, 4)
    assert restart_policy.decide(2 * [failed(7)], Recovery(), start_step=7) == Restart(1.0, 4)


@pytest.mark.parametrize(
    "last",
    [
        failed(3, exit_status=0),
        failed(3, exit_status=2),
        failed(3, exit_status=75, asked_to_stop=True),
        failed(3, exit_status=130, asked_to_stop=True),
        failed(3, exit_status=1, end_reason="nonfinite"),
        failed(3, exit_status=1, end_reason="faulty_device"),
    ],
)
def test_a_job_that_ended_by_its_own_rules_or_on_request_is_over(last):
    assert restart_policy.decide([last], Recovery()) == End(last.exit_status)


@pytest.mark.parametrize("end_reason", [None, "hang", "error", "preempted"])
def test_a_crash_and_a_hang_are_tried_again(end_reason):
    assert isinstance(restart_policy.decide([failed(3, exit_status=75, end_reason=end_reason)], Recovery()), Restart)


def test_after_two_fruitless_attempts_it_goes_on_with_half_the_processes_if_allowed():
    twice = [failed(3), failed(3), failed(3)]
    assert restart_policy.decide(twice, Recovery()).__class__ is Restart
    assert restart_policy.decide(twice, Recovery()).num_processes == 4
    settings = Recovery(min_processes=2, max_fruitless=9)
    assert restart_policy.decide(twice[:2], settings).num_processes == 4
    assert restart_policy.decide(twice, settings).num_processes == 2
    fewer = [*twice, failed(3, num_processes=2)]
    assert restart_policy.decide(fewer, settings).num_processes == 2


def test_a_run_that_had_ended_is_done_whatever_killed_a_process_after_that():
    for reason in ("max_steps", "target_reached", "patience"):
        assert restart_policy.decide([failed(3, end_reason=reason)], Recovery()) == End(0)


@pytest.mark.parametrize("available", [2, 6])
def test_a_change_of_the_processes_is_no_failure(available):
    changed = failed(7, exit_status=75, end_reason="preempted", available=available)
    assert restart_policy.decide([changed], Recovery(), start_step=7) == Restart(0.0, available)
    attempts = [failed(7), *[changed] * 9, failed(7, num_processes=available)]
    assert restart_policy.decide(attempts, Recovery(max_fruitless=2)) == Restart(0.0, available)


def test_a_number_of_processes_that_does_not_suit_ends_no_job():
    mistaken = failed(7, exit_status=2, available=2)
    assert restart_policy.decide([failed(7), mistaken], Recovery()) == Restart(0.0, 2)
    assert restart_policy.decide([failed(7), failed(8, exit_status=2)], Recovery()) == End(2)


@pytest.mark.parametrize(
    "last", [failed(9, exit_status=0, end_reason="max_steps"), failed(9, exit_status=75, asked_to_stop=True)]
)
def test_a_job_that_is_over_is_not_continued_by_those_that_join(last):
    ended = dataclasses.replace(last, available=6)
    assert restart_policy.decide([ended], Recovery()) == End(last.exit_status)

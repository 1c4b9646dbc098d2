"""Planted bugs: each must turn a handful of runs red, and the same schedules are green without it."""

import planted
import pytest

WITHIN = 150
"""Schedules in which every planted bug must show."""
SLOW = {"dedup table not copied", "a backup without the state"}
"""Bugs that need many schedules."""


@pytest.mark.parametrize("bug", [pytest.param(b, marks=pytest.mark.slow if b in SLOW else ()) for b in planted.BUGS])
def test_a_planted_bug_turns_the_suite_red(bug):
    assert planted.BUGS[bug].found(within=WITHIN) <= WITHIN


def test_without_a_planted_bug_these_schedules_are_green():
    for seed, bug in enumerate(planted.BUGS.values()):
        bug.play(100 * seed, planted=False)


@pytest.mark.soak
@pytest.mark.parametrize("bug", planted.BUGS)
def test_without_a_planted_bug_many_schedules_are_green(bug):
    for seed in range(100):
        planted.BUGS[bug].play(seed, planted=False)

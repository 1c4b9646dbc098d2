"""What is planned happens in order of time, and a seed decides what is random."""

from jaxdist.paramserver.simulator.seeded_time import SeededTime


def test_actions_happen_in_order_and_equal_times_in_the_order_of_their_planning():
    time, done = SeededTime(0), []
    for delay, name in ((0.2, "c"), (0.1, "a"), (0.1, "b"), (-1.0, "now")):
        time.at(delay, lambda name=name: done.append((name, time.now)))
    while time.step():
        pass
    assert done == [("now", 0.0), ("a", 0.1), ("b", 0.1), ("c", 0.2)]


def test_what_happens_often_ends_in_time_and_replays():
    def times(seed):
        time, found = SeededTime(seed), []
        time.often(10.0, 2.0, lambda: found.append(time.now))
        time.often(0.0, 2.0, lambda: found.append("never"))
        while time.step():
            pass
        return found

    assert times(1) == times(1) != times(2)
    assert 5 < len(times(1)) < 50
    assert max(times(1)) < 2.0

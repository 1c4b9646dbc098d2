"""Cores are divided evenly or not at all, and all threads of a process keep to its own."""

import collections
import os
import threading

from hypothesis import given
from hypothesis import strategies as st

from jaxdist.launch import own_cores


@given(st.integers(1, 12), st.integers(1, 12))
def test_each_core_has_as_many_processes_as_any_other_and_each_process_as_many_cores(of, count):
    cores = [3 + 2 * number for number in range(count)]
    shares = [own_cores.share(place, of, cores) for place in range(of)]
    assert len({len(each) for each in shares}) == 1
    used = collections.Counter(core for each in shares for core in each)
    assert set(used) == set(cores)
    assert len(set(used.values())) == 1
    if not max(of, count) % min(of, count):
        assert len(shares[0]) == max(count // of, 1)


def test_all_threads_keep_to_the_cores_of_their_process_until_it_may_use_all():
    every, found, go = os.sched_getaffinity(0), [], threading.Event()

    def look():
        go.wait(60)
        found.append(os.sched_getaffinity(0))

    earlier = threading.Thread(target=look)
    earlier.start()
    cores = own_cores.OwnCores(0, len(every))
    try:
        cores.keep(own=True)
        later = threading.Thread(target=look)
        later.start()
        go.set()
        for thread in (earlier, later):
            thread.join(60)
        assert found == [{min(every)}] * 2
    finally:
        cores.keep(own=False)
    assert os.sched_getaffinity(0) == every

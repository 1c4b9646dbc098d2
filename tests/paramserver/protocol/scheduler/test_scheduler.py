"""The scheduler as a whole: what it repeats, and what a step costs with many workers."""

import time

import stages

from jaxdist.paramserver.protocol.scheduler.scheduler import AwakeClock


def test_the_clock_advances_by_what_it_could_observe():
    clock = AwakeClock(0.5)
    times = [clock.advance(now) for now in (10.0, 10.2, 110.2, 110.3, 5.0, 5.1)]
    assert [round(t, 3) for t in times] == [10.0, 10.2, 10.7, 10.8, 10.8, 10.9]


def test_a_term_that_a_shard_did_not_enter_is_announced_again():
    cast = stages.Cast(stages.settings(servers=2)).join()
    cast.state.acks.pop(1)
    sent = []
    for _ in range(4):
        sent += cast.tick(0.5)[0]
    assert {to for to, message in sent if type(message).__name__ == "Membership"} == {"server/1/a"}


def seconds_a_step(workers):
    chosen = stages.settings(
        workers=workers, servers=16, global_batch_size=workers, num_examples=100 * workers, max_steps=1000
    )
    cast = stages.Cast(chosen).join()
    best = 1.0
    for _ in range(4):
        start = time.process_time()
        cast.step()
        best = min(best, time.process_time() - start)
    return best


def test_the_work_of_a_step_grows_with_the_workers_and_not_with_their_square():
    """Eight times the workers: eight times the work, with room for noise; squared it would be 64 times."""
    assert seconds_a_step(256) < 24 * seconds_a_step(32)

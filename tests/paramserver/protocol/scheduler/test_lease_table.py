"""The lease table: the leases of an epoch are disjoint and complete, and only a commit moves them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.paramserver.protocol.journal import Trained
from jaxdist.paramserver.protocol.messages import Contributor, Metric
from jaxdist.paramserver.protocol.scheduler.lease_table import BatchLeases, StepLeases, add_metrics, lease
from jaxdist.paramserver.protocol.settings import Settings


def settings(**changes):
    return Settings(**{"num_examples": 20, "global_batch_size": 6, "max_steps": 9, **changes})


@given(st.integers(1, 40), st.integers(4, 12), st.integers(1, 4), st.integers(0, 3))
def test_leases_cover_every_epoch_once(num_examples, batch, workers, epoch):
    chosen = settings(num_examples=num_examples, global_batch_size=batch, workers=workers)
    steps = range(epoch * chosen.steps_per_epoch, (epoch + 1) * chosen.steps_per_epoch)
    leases = [lease(chosen, step, slice_) for step in steps for slice_ in range(workers)]
    assert {held.epoch for held in leases} == {epoch}
    assert [i for held in leases for i in range(held.start, held.stop)] == list(range(num_examples))


def push(held, worker=0):
    return Contributor(worker, 1, 1, held)


def test_a_step_waits_for_every_slice_and_takes_the_first_push_of_each():
    leases = StepLeases(settings(workers=3, backup_workers=1))
    first, second, copy = (leases.pick(worker) for worker in range(3))
    assert copy == first
    leases.finish(push(first, 2), True, ())
    leases.finish(push(first, 0), False, ())
    assert leases.contributors() is None
    leases.finish(push(second, 1), True, ())
    assert [c.worker for c in leases.contributors()] == [2, 1]
    assert leases.finite()
    leases.advance()
    assert leases.trained() == Trained(1, ())


def test_without_backup_workers_a_slice_is_out_once():
    leases = StepLeases(settings(workers=2))
    held = leases.pick(0)
    leases.pick(1)
    assert leases.pick(2) is None
    leases.give_back(0, held)
    assert leases.pick(2) == held


@given(st.lists(st.tuples(st.sampled_from(["pick", "finish", "lose"]), st.integers(0, 3)), max_size=60))
def test_batches_are_done_once_whatever_order(moves):
    leases = BatchLeases(settings())
    held, done = {}, []
    for move, worker in moves:
        if move == "pick" and worker not in held:
            got = leases.pick(worker)
            if got is not None:
                assert got.step not in done
                assert got.step not in [other.step for other in held.values()]
                held[worker] = got
        elif worker in held:
            got = held.pop(worker)
            if move == "finish":
                assert leases.complete(got.step)
                assert not leases.complete(got.step)
                done.append(got.step)
            else:
                leases.give_back(worker, got)
        state = leases.trained()
        assert sorted(done) == [*range(state.step), *state.beyond]
        assert BatchLeases(settings(), state).trained() == state


def test_metrics_are_added_as_totals_and_counts():
    got = add_metrics([(Metric("loss", 3.0, 1.0), Metric("hits", 1.0, 2.0)), (Metric("loss", 1.0, 3.0),)])
    assert got == (Metric("loss", 4.0, 4.0), Metric("hits", 1.0, 2.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "hogwild"}, "ps.mode must be one of"),
        ({"durability": "raid"}, "ps.durability must be one of"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"max_staleness": 2}, "ps.max_staleness applies to ps.mode=bounded"),
        ({"mode": "async", "backup_workers": 1, "workers": 2}, "ps.backup_workers needs a synchronous mode"),
        ({"backup_workers": 2, "workers": 2}, "must be smaller than ps.workers"),
        ({"workers": 7}, "cannot be divided into 7 slices"),
        ({"durability": "snapshot"}, "needs ps.snapshot_every"),
        ({"snapshot_every": 3}, "has no effect with ps.durability=none"),
        ({"damp_staleness": True}, "no effect without staleness"),
        ({"read_every": (0,)}, "periods in read_every"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)

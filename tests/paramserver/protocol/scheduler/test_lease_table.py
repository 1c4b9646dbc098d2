"""The lease table: the leases of an epoch are disjoint and complete, and only a commit moves them."""

from hypothesis import given
from hypothesis import strategies as st

from jaxdist.paramserver.protocol.messages import Done, Metric, Trained
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


def done(held, worker=0, *, count=2.0, finite=True):
    return Done(worker, 1, 1, 0, held, count, finite, ())


def test_a_step_waits_for_every_slice_and_takes_the_first_push_of_each():
    leases = StepLeases(settings(workers=3, backup_workers=1))
    first, second, copy = (leases.pick(worker) for worker in range(3))
    assert copy == first
    leases.finish(done(first, 2))
    leases.finish(done(first, 0, finite=False))
    assert not leases.is_complete()
    leases.finish(done(second, 1))
    assert leases.is_complete()
    assert [c.worker for c in leases.contributors()] == [2, 1]
    assert leases.finite()
    assert leases.count() == 4.0
    leases.advance()
    assert leases.trained() == Trained(1, ())


def test_without_backup_workers_a_slice_is_out_once():
    leases = StepLeases(settings(workers=2))
    held = leases.pick(0)
    leases.pick(1)
    assert leases.pick(2) is None
    leases.give_back(0, held)
    assert leases.pick(2) == held


def test_a_slice_whose_push_came_after_all_is_not_leased_again_to_the_worker_that_gave_it_back():
    leases = StepLeases(settings(workers=2))
    held = leases.pick(0)
    leases.give_back(0, held)
    leases.finish(done(held))
    assert leases.pick(0).slice == 1 - held.slice


def test_a_report_on_a_finished_slice_or_an_earlier_step_counts_for_no_slice():
    leases = StepLeases(settings(workers=2))
    first, second = leases.pick(0), leases.pick(1)
    leases.finish(done(first))
    assert not leases.note_computed(done(first, 1))
    leases.advance()
    assert not leases.note_computed(done(second, 1))
    assert not leases.note_computed(done(leases.pick(0)))


def test_what_is_of_an_earlier_step_or_of_another_worker_changes_nothing():
    leases = StepLeases(settings(workers=2))
    old = leases.pick(0)
    leases.advance()
    leases.finish(done(old))
    leases.hold(1, old)
    leases.give_back(0, old)
    held = leases.pick(0)
    leases.hold(0, held)  # it reports what is known
    leases.give_back(1, held)
    assert (leases.done, leases.holders) == ({}, [[0], []])
    leases.give_back(0, held)
    assert [leases.pick(worker).slice for worker in (1, 0)] == [0, 1]


def test_a_batch_that_is_trained_is_not_held_and_only_its_holder_gives_one_back():
    leases = BatchLeases(settings())
    first, second = leases.pick(0), leases.pick(1)
    leases.complete(first.step)
    leases.hold(0, first)
    leases.give_back(0, second)
    assert leases.out == {second.step: 1}


@given(
    st.integers(0, 2), st.lists(st.tuples(st.sampled_from(["pick", "finish", "lose"]), st.integers(0, 4)), max_size=60)
)
def test_a_slice_has_at_most_one_holder_and_its_copies(backup, moves):
    leases = StepLeases(settings(workers=3 + backup, backup_workers=backup))
    held, pushed = {}, set()
    for move, worker in moves:
        if move == "pick" and worker not in held:
            free = set(range(3)) - pushed - {lease.slice for lease in held.values()}
            got = leases.pick(worker)
            assert got is not None or not free
            if got is not None:
                assert got.slice not in pushed
                assert not free or got.slice == min(free)
                held[worker] = got
        elif move == "finish" and worker in held:
            pushed.add(held[worker].slice)
            leases.finish(done(held.pop(worker), worker))
        elif move == "lose" and worker in held:
            leases.give_back(worker, held.pop(worker))
        for i in range(3):
            assert sum(lease.slice == i for lease in held.values()) <= backup + 1
        assert leases.is_complete() == (pushed == {0, 1, 2})


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

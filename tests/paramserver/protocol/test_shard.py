"""A shard by itself: what fits, what is refused, rows, scaling, and that its state is one value."""

import dataclasses

import numpy as np
import pytest
import workload

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.protocol.settings import Settings
from jaxdist.paramserver.protocol.shard import Shard
from jaxdist.paramserver.protocol.sums import dense
from jaxdist.paramserver.wire import encoding

PARAMS = (np.arange(6, dtype=np.float32), np.ones(2, np.float32))


def settings(**changes):
    return Settings(**{"num_examples": 20, "global_batch_size": 6, "max_steps": 9, "mode": "async", **changes})


def shard(**changes):
    made = Shard(shard=0, settings=settings(**changes), updater=workload.Momentum(), params=PARAMS)
    made.apply(messages.SetMembers(1, (messages.Member(0, 1, 0), messages.Member(1, 2, 0))))
    return made


def push(pieces=None, *, worker=0, incarnation=1, sequence=1, version=0, clock=0, **changes):
    lease = messages.Lease(0, 0, 0, 0, 2)
    pieces = tuple(np.ones_like(p) for p in PARAMS) if pieces is None else pieces
    made = messages.Push(0, worker, incarnation, sequence, version, clock, lease, 2.0, 2.0, True, 0.0, pieces)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pieces": PARAMS[:1]}, "needs 2 pieces, one for each block, got 1"),
        ({"pieces": (PARAMS[0].astype(np.float64), PARAMS[1])}, "dtype float32, its piece has float64"),
        ({"pieces": (PARAMS[0][:3], PARAMS[1])}, "shape"),
        ({"pieces": (PARAMS[0] * np.nan, PARAMS[1])}, "declared finite, but its piece"),
        ({"count": -1.0}, "must count at least 0 examples, got -1.0"),
        ({"pieces": (messages.Rows(np.array([3]), np.ones((1, 2), np.float32)), PARAMS[1])}, "do not fit"),
        ({"pieces": (messages.Rows(np.array([0]), np.ones((1, 4), np.float32)), PARAMS[1])}, "do not fit"),
    ],
)
def test_a_push_that_does_not_fit_is_refused_with_a_reason(changes, words):
    assert words in shard().complaint(push(**changes))
    assert shard().complaint(push()) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 0.0, "num_examples": 0.0},
        {"pieces": (PARAMS[0] * np.nan, PARAMS[1]), "finite": False},
        {"pieces": (messages.Rows(np.array([2, 0]), np.ones((2, 2), np.float32)), PARAMS[1])},
        {"pieces": (messages.Rows(np.zeros(0, np.int64), np.ones((0, 2), np.float32)), PARAMS[1])},
    ],
)
def test_pushes_that_fit_although_they_are_empty_sparse_or_not_finite(changes):
    assert shard().complaint(push(**changes)) == ""


@pytest.mark.parametrize("value", [np.nan, 1j * np.nan, np.inf, -1j * np.inf])
def test_no_part_of_a_complex_push_may_be_infinite(value):
    params = (np.ones(3, np.complex64),)
    one = Shard(shard=0, settings=settings(), updater=workload.Momentum(), params=params)
    assert one.complaint(push(params)) == ""
    assert "declared finite" in one.complaint(push((np.array([1, value, 1], np.complex64),)))


def test_a_huge_but_finite_push_is_finite():
    assert shard().complaint(push((np.full(6, 3e38, np.float32), PARAMS[1]))) == ""


def test_rows_do_what_the_dense_push_does():
    rows = messages.Rows(np.array([2, 0, 2]), np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    wanted = np.array([3, 4, 0, 0, 6, 8], np.float32)
    assert np.array_equal(dense(rows, PARAMS[0]), wanted)
    sparse, full = shard(), shard()
    sparse.apply(push((rows, PARAMS[1])))
    full.apply(push((wanted, PARAMS[1])))
    assert np.array_equal(sparse.params[0], full.params[0])


def test_a_push_counts_once_and_zombies_do_not():
    one = shard()
    assert one.verdict(push()) == "applied"
    one.apply(push())
    assert one.verdict(push()) == "duplicate"
    assert one.verdict(push(sequence=2)) == "applied"
    assert one.verdict(push(incarnation=7)) == "fenced"
    one.apply(messages.SetMembers(2, (messages.Member(0, 3, 0),)))
    assert one.verdict(push(sequence=2)) == "fenced"
    assert one.verdict(push(incarnation=3)) == "applied"


def stepped(updater, grads, *, norm_squared=0.0):
    """Return the params after one step of the optimizer alone."""
    return updater.update(PARAMS, updater.init(PARAMS), grads, step=0, scale=1.0, norm_squared=norm_squared)[0]


def assert_params(one, wanted):
    for param, other in zip(one.params, wanted, strict=True):
        np.testing.assert_array_equal(param, other)


@pytest.mark.parametrize(("count", "counts"), [(0.0, False), (0.5, True), (1.0, True), (4.0, True)])
def test_a_push_is_one_step_of_the_optimizer_along_its_mean_unless_it_counts_no_example(count, counts):
    one = shard()
    outcome = one.apply(push(count=count))
    grads = tuple(np.ones_like(param) / np.float32(count or 1) for param in PARAMS)
    assert_params(one, stepped(workload.Momentum(), grads) if counts else PARAMS)
    assert [(each.version, each.skipped) for each in outcome.effects] == [(1, not counts)]


def sync(*, clip=False):
    made = Shard(shard=0, settings=settings(mode="sync"), updater=workload.Momentum(clip=clip), params=PARAMS)
    made.apply(messages.SetMembers(1, (messages.Member(0, 1, 0),)))
    return made


COMMIT = messages.Commit(1, 0, 1, False, (messages.Contributor(0, 1, 1, messages.Lease(0, 0, 0, 0, 2)),))


@pytest.mark.parametrize("ready", [False, True])
def test_an_optimizer_that_needs_the_global_norm_steps_once_it_has_it(ready):
    """The shard tells its part of the norm, and waits for that of all."""
    one, half = sync(clip=True), tuple(np.full_like(param, 0.5) for param in PARAMS)
    one.apply(push())
    if ready:
        one.get_ready()
    assert one.ahead() is None
    (norms,) = one.apply(COMMIT).replies
    assert norms.message == messages.Norms(COMMIT.term, 0, 1, (1.5, 0.5))
    assert one.apply(messages.Finish(1, 0, 5, 9.0)).replies == []  # of another step
    assert one.verdict(push(sequence=2)) == "obsolete"  # the step is decided
    assert_params(one, PARAMS)
    for _ in range(2):  # the second copy is answered alike
        (answer,) = one.apply(messages.Finish(1, 0, 1, 100.0)).replies
        assert (answer.message.step, answer.message.squares, one.version) == (1, 2.0, 1)
        assert_params(one, stepped(workload.Momentum(clip=True), half, norm_squared=100.0))


def test_a_push_of_a_step_that_is_committed_is_obsolete_and_one_of_the_next_step_is_kept_for_it():
    one = sync()
    next_ = push(sequence=2, lease=messages.Lease(1, 0, 0, 2, 4))
    one.apply(next_)
    assert one.staged_note() is None
    one.apply(push())
    assert one.staged_note().step == 0
    one.apply(COMMIT)
    assert one.verdict(push(sequence=3)) == "obsolete"
    assert one.staged_note().step == 1


def test_the_chain_tells_who_made_the_updates():
    first, other = shard(), shard()
    first.apply(push())
    other.apply(push(worker=1, incarnation=2))
    assert first.chain != other.chain


@pytest.mark.parametrize(
    ("before", "after", "clock"),
    [
        ((), messages.Member(0, 1, 0), 5),
        ((), messages.Member(0, 1, 7), 7),
        ((), messages.Member(0, 3, 2), 2),
        ((messages.Member(0, 1, messages.BENCHED),), messages.Member(0, 1, 6), 6),
    ],
    ids=["stays", "is set to the front", "started again", "returns from the bench"],
)
def test_the_clock_of_a_member(before, after, clock):
    one = shard(mode="bounded", max_staleness=1)
    one.apply(push(clock=4))
    for term, member in enumerate((*before, after), start=2):
        one.apply(messages.SetMembers(term, (member,)))
    assert one.clocks == {0: clock}


def test_staleness_damps_the_step():
    plain, damped = shard(), shard(damp_staleness=True)
    for one in (plain, damped):
        one.apply(push())
        one.apply(push(worker=1, incarnation=2, version=1))
    assert np.array_equal(plain.params[0], damped.params[0])
    before = plain.params[0]
    for one in (plain, damped):
        outcome = one.apply(push(sequence=2, version=0))
        assert outcome.effects[0].staleness == 2
    assert not np.array_equal(before, plain.params[0])
    assert np.allclose((before - plain.params[0]) / 3, before - damped.params[0])


def test_a_push_that_is_not_finite_changes_nothing_but_counts():
    one = shard()
    one.apply(push((PARAMS[0] * np.nan, PARAMS[1]), finite=False))
    assert one.version == 1
    assert np.array_equal(one.params[0], PARAMS[0])
    assert one.verdict(push()) == "duplicate"


def test_model_state_is_averaged_over_examples_and_params_over_what_the_loss_counts():
    class Mean:
        needs_norm, num_params = False, 1

        def init(self, params):
            return ()

        def update(self, params, opt_state, grads, *, step, scale, norm_squared):
            return grads, opt_state

    one = Shard(shard=0, settings=settings(mode="sync", workers=2), updater=Mean(), params=PARAMS)
    one.apply(messages.SetMembers(1, (messages.Member(0, 1, 0), messages.Member(1, 2, 0))))
    parts = []
    for worker, count, value in ((0, 1.0, 4.0), (1, 7.0, 8.0)):
        pieces = (np.full(6, value * count, np.float32), np.full(2, value * 2.0, np.float32))
        made = push(pieces, worker=worker, incarnation=worker + 1, count=count, num_examples=2.0)
        made = dataclasses.replace(made, lease=messages.Lease(0, worker, 0, 2 * worker, 2 * worker + 2))
        one.apply(made)
        parts.append(messages.Contributor(worker, worker + 1, 1, made.lease))
    one.apply(messages.Commit(1, 0, 1, False, tuple(parts)))
    assert one.params[0][0] == 7.5
    assert one.params[1][0] == 6.0


def test_the_state_is_one_value_and_travels():
    one, other = shard(mode="sync"), shard(mode="sync")
    one.apply(push())
    state = encoding.decode(encoding.to_bytes(one.export()))
    other.adopt(state)
    contributor = messages.Contributor(0, 1, 1, messages.Lease(0, 0, 0, 0, 2))
    commit = messages.Commit(1, 0, 1, False, (contributor,))
    for copy in (one, other):
        copy.apply(commit)
    assert one.chain == other.chain != 0
    assert all(np.array_equal(a, b) for a, b in zip(one.params, other.params))
    assert other.verdict(push()) == "duplicate"


def test_a_bounded_read_waits_for_the_slowest():
    one = shard(mode="bounded", max_staleness=1)
    assert one.may_read(messages.Pull(0, 0, 1, 1, 0, 1))
    assert not one.may_read(messages.Pull(0, 0, 1, 1, 0, 2))
    one.apply(push(worker=1, incarnation=2, clock=0))
    one.apply(push(worker=0, clock=0))
    assert one.may_read(messages.Pull(0, 0, 1, 1, 0, 2))
    one.apply(messages.SetMembers(2, (messages.Member(0, 1, 0), messages.Member(1, 2, messages.BENCHED))))
    one.apply(push(worker=0, sequence=2, clock=1))
    assert one.may_read(messages.Pull(0, 0, 1, 1, 0, 3))

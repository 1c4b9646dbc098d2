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

"""The mean of a step: in slice order, whatever arrived first, and the same bits ahead of the commit and at it."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import workload

from jaxdist.paramserver.protocol import messages, sums
from jaxdist.paramserver.protocol.settings import Settings
from jaxdist.paramserver.protocol.shard import Shard

PARAMS = (np.arange(6, dtype=np.float32), np.ones(2, np.float32))


def push(slice_, *, worker=None, sequence=1, count=2.0, finite=True, sparse=False):
    rng = np.random.default_rng([slice_, worker or 0])
    pieces = tuple(rng.normal(size=param.shape).astype(param.dtype) for param in PARAMS)
    if sparse:
        pieces = (messages.Rows(np.array([2, 0, 2]), rng.normal(size=(3, 2)).astype(np.float32)), pieces[1])
    lease = messages.Lease(0, slice_, 0, 2 * slice_, 2 * slice_ + 2)
    who = slice_ if worker is None else worker
    return messages.Push(0, who, who + 1, sequence, 0, 0, lease, count, 3.0, finite, 0.0, pieces)


def shard(workers):
    settings = Settings(num_examples=40, global_batch_size=20, max_steps=9, workers=workers)
    made = Shard(shard=0, settings=settings, updater=workload.Momentum(), params=PARAMS)
    made.apply(messages.SetMembers(1, tuple(messages.Member(n, n + 1, 0) for n in range(workers + 1))))
    return made


def commit(pushes, *, skip=False):
    contributors = tuple(messages.Contributor(p.worker, p.incarnation, p.sequence, p.lease) for p in pushes)
    return messages.Commit(1, 0, 1, skip, contributors)


def by_hand(pushes):
    """Return the mean gradient: a plain left fold over the slices."""
    found = []
    for block, param in enumerate(PARAMS):
        total = sums.dense(pushes[0].pieces[block], param)
        for each in pushes[1:]:
            total = total + sums.dense(each.pieces[block], param)
        found.append(total / np.float32(sum(each.count for each in pushes)))
    return found


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(order=st.permutations(range(5)), ready=st.sets(st.integers(0, 4)), sparse=st.booleans())
def test_the_bits_depend_neither_on_the_order_of_arrival_nor_on_when_the_sum_is_made(order, ready, sparse):
    pushes = [push(n, sparse=sparse) for n in range(5)]
    copies = [[piece if isinstance(piece, messages.Rows) else piece.copy() for piece in p.pieces] for p in pushes]
    made = shard(5)
    for place, number in enumerate(order):
        made.apply(pushes[number])
        if place in ready:
            made.get_ready()
    made.apply(commit(pushes))
    wanted, _ = workload.Momentum().update(
        PARAMS, workload.Momentum().init(PARAMS), by_hand(pushes), step=0, scale=1.0, norm_squared=0.0
    )
    for got, want in zip(made.params, wanted, strict=True):
        assert np.array_equal(got, want)
    for each, kept in zip(pushes, copies, strict=True):  # a backup may still get them
        assert all(a is b or np.array_equal(a, b) for a, b in zip(each.pieces, kept, strict=True))


def test_a_commit_of_other_pushes_does_not_use_what_is_ready():
    """A worker that died had staged the slice before the one that was chosen."""
    staged, chosen = push(0, worker=1), push(0, worker=0)
    made = shard(1)
    for each in (staged, chosen):
        made.apply(each)
        made.get_ready()
    made.apply(commit([chosen]))
    other = shard(1)
    other.apply(chosen)
    other.apply(commit([chosen]))
    assert np.array_equal(made.params[0], other.params[0])


@pytest.mark.parametrize("changes", [{"count": 0.0}, {"finite": False}])
def test_nothing_is_made_ahead_of_what_will_not_be_applied(changes):
    made = shard(1)
    one = dataclasses.replace(push(0), **changes)
    made.apply(one)
    made.updater.update = None
    made.get_ready()
    made.apply(commit([one], skip=True))
    assert made.version == 1
    assert made.params == PARAMS


def test_what_is_ready_is_forgotten_with_the_state_it_was_made_from():
    made = shard(1)
    start = made.export()
    made.apply(push(0))
    made.get_ready()
    made.adopt(start)
    again = push(0, sequence=2)
    made.apply(again)
    made.get_ready()
    made.apply(commit([again]))
    assert made.version == 1


def test_the_second_step_begins_with_a_sum_of_its_own():
    made = shard(1)
    for step in range(2):
        one = dataclasses.replace(push(0, sequence=step + 1), lease=messages.Lease(step, 0, 0, 0, 2), version=step)
        made.apply(one)
        made.get_ready()
        made.apply(dataclasses.replace(commit([one]), step=step + 1))
    assert made.version == 2

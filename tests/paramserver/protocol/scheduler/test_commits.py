"""The commits stage: a step is logged before any shard hears of it, and repeated until all applied it."""

import pytest
import stages

from jaxdist.paramserver.protocol import messages


def half_done(**changes):
    cast = stages.Cast(stages.settings(workers=2, servers=2, **changes)).join()
    leases = [cast.ask(0), cast.ask(1)]
    cast.finish(1, leases[1])
    return cast, leases[0]


def test_a_step_is_committed_in_slice_order_once_all_pushes_are_staged():
    cast, lease = half_done()
    sent, done = cast.finish(0, lease)
    (record,) = stages.named(stages.named(done, "Append"), "Append")
    assert [c.worker for c in record.record.contributors] == [0, 1]
    (told,) = stages.named(done, "Committed")
    assert (told.step, told.examples, told.metrics) == (1, 6, (messages.Metric("loss", 2.0, 4.0),))
    assert [commit.shard for commit in stages.named(sent, "Commit")] == [0, 1]


def test_a_step_that_is_not_finite_is_applied_nowhere_and_ends_the_run():
    cast = stages.Cast(stages.settings(stop_on_nonfinite=True)).join()
    sent, _ = cast.finish(0, cast.ask(0), finite=False)
    assert [commit.skip for commit in stages.named(sent, "Commit")] == [True]
    assert cast.state.end_reason() == "nonfinite"


@pytest.mark.parametrize("finite", [True, False], ids=["zeros", "0/0"])
def test_a_batch_of_which_nothing_counts_is_applied_nowhere_and_training_continues(finite):
    cast = stages.Cast(stages.settings(stop_on_nonfinite=True)).join()
    sent, done = cast.finish(0, cast.ask(0), count=0.0, finite=finite)
    assert [commit.skip for commit in stages.named(sent, "Commit")] == [True]
    (told,) = stages.named(done, "Committed")
    assert (told.step, told.empty) == (1, True)
    assert (cast.state.end_reason(), cast.state.empty_step) == ("", 1)
    assert "no update was made" in stages.named(done, "Warn")[0].text
    records = [effect.record for effect in stages.named(done, "Append")]
    assert [type(record).__name__ for record in records] == ["EmptyRecord", "CommitRecord"]
    # A scheduler that restarts reads the same off its log.
    again = cast.restarted().state
    assert (again.step, again.end_reason(), again.empty_step) == (1, "", 1)


def test_a_slice_may_count_nothing_if_another_counts_something():
    cast, lease = half_done()
    sent, _ = cast.finish(0, lease, count=0.0)
    assert [commit.skip for commit in stages.named(sent, "Commit")] == [False, False]


@pytest.mark.parametrize("mode", ["async", "bounded"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [({}, ""), ({"count": 0.0}, ""), ({"count": 0.0, "finite": False}, ""), ({"finite": False}, "nonfinite")],
)
def test_an_asynchronous_run_ends_at_what_is_not_finite_and_not_at_an_empty_batch(mode, changes, reason):
    cast = stages.Cast(stages.settings(mode=mode, stop_on_nonfinite=True)).join()
    _, done = cast.finish(0, cast.ask(0), **changes)
    assert cast.state.end_reason() == reason
    assert [told.empty for told in stages.named(done, "Committed")] == ["count" in changes]


def test_only_shards_that_have_not_acknowledged_hear_it_again():
    cast, lease = half_done()
    cast.finish(0, lease)
    cast.tell(messages.CommitAck(cast.state.term, 0, 1))
    for _ in range(4):
        sent, _ = cast.tick(0.5)
    assert {commit.shard for commit in stages.named(cast.tick(1.0)[0] + sent, "Commit")} == {1}


def test_norms_are_added_in_shard_order_and_logged():
    cast, lease = half_done()
    cast.finish(0, lease)
    cast.tell(messages.Norms(cast.state.term, 1, 1, (4.0,)))
    sent, done = cast.tell(messages.Norms(cast.state.term, 0, 1, (1.0, 2.0)))
    assert [effect.record.norm_squared for effect in stages.named(done, "Append")] == [7.0]
    assert [finish.norm_squared for finish in stages.named(sent, "Finish")] == [7.0, 7.0]


@pytest.mark.parametrize("late", [messages.CommitAck, messages.Norms])
def test_what_a_shard_told_before_a_rollback_says_nothing_of_a_step_after_it(late):
    cast = stages.Cast(stages.settings(servers=2, durability="snapshot", snapshot_every=2)).join()
    before = cast.state.term
    cast.tell(messages.Died("server/0/a", 1), messages.Register("server/0/a", 2))
    assert cast.state.counters["rollbacks"] == 1
    cast.enter_term()
    cast.tell(messages.Register("worker/0", 2))
    cast.tick()
    cast.enter_term()
    cast.finish(0, cast.ask(0))
    step = cast.state.last_commit.step
    told = {messages.CommitAck: (step, 4.0), messages.Norms: (step, (4.0,))}[late]
    for term in (before, cast.state.term):
        assert cast.state.last_commit is not None
        assert cast.state.norm_squared is None
        cast.tell(*(late(term, shard, *told) for shard in range(2)))
    assert cast.state.last_commit is None or cast.state.norm_squared == 8.0

"""A worker by itself, where a run would meet the case too rarely."""

import dataclasses

import numpy as np
import pytest

from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.settings import SCHEDULER, Settings
from jaxdist.paramserver.protocol.worker import Worker

SETTINGS = Settings(num_examples=20, global_batch_size=6, max_steps=9, mode="async")
SHARD = messages.ShardPlace("server/0/a", 1, "", 0, False)
LEASE = messages.Lease(0, 0, 0, 0, 6)


def membership(term, incarnation):
    return messages.Membership(term, (messages.Member(0, incarnation, 0),), (SHARD,), 1, "")


def join(worker, term, incarnation):
    worker.handle(messages.Tick(), 0.0)
    worker.handle(messages.Welcome(worker.name, worker.boot, incarnation, membership(term, incarnation)), 0.0)


def compute(worker, term, incarnation):
    worker.handle(messages.Grant(0, incarnation, term, 1, 0, LEASE), 0.0)
    _, todo = worker.handle(messages.Pulled(0, 0, incarnation, 1, 0, (np.zeros(2, np.float32),)), 0.0)
    return next(effect for effect in todo if isinstance(effect, effects.Compute))


def test_a_worker_whose_boot_number_is_too_small_registers_with_a_larger_one():
    worker = Worker(worker=0, boot=3, settings=SETTINGS)
    assert worker.handle(messages.Fenced(worker.name, 2, 9), 0.0) == ([], [])  # of another start
    (sent,), _ = worker.handle(messages.Fenced(worker.name, 3, 9), 0.0)
    assert sent.message == messages.Register(worker.name, 10)


def test_a_gradient_of_an_earlier_life_is_not_pushed():
    """Both lives number their leases from 1; the older gradient belongs to other examples."""
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    join(worker, 1, 1)
    old = compute(worker, 1, 1)
    worker.handle(messages.Fenced(worker.name, worker.boot), 1.0)
    join(worker, 2, 2)
    new = compute(worker, 2, 2)
    assert (old.sequence, new.sequence) == (1, 1)
    late = messages.Computed(old.incarnation, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ())
    assert worker.handle(late, 2.0) == ([], [])
    (sent,), _ = worker.handle(messages.Computed(new.incarnation, 1, 6.0, 6.0, True, 0.0, late.pieces, ()), 2.0)
    assert sent.to == "server/0/a"
    assert sent.message.incarnation == 2


def test_a_grant_of_an_older_term_is_ignored():
    """A scheduler that was started again has been told that this worker holds no lease."""
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    join(worker, 5, 1)
    assert worker.handle(messages.Grant(0, 1, 4, 1, 0, LEASE), 0.0) == ([], [])


def test_a_refused_push_ends_the_worker_and_says_why():
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    join(worker, 1, 1)
    compute(worker, 1, 1)
    worker.handle(messages.Computed(1, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ()), 1.0)
    _, (end,) = worker.handle(messages.PushAck(0, 0, 1, 1, "refused", "block 0 has dtype float32"), 1.0)
    assert "block 0 has dtype float32" in end.reason


def test_whatever_is_unanswered_is_said_again():
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    for now in (0.0, 2.0, 4.0):
        replies, _ = worker.handle(messages.Tick(), now)
        assert effects.Send(SCHEDULER, messages.Register("worker/0", 10)) in replies


def push_all(worker, sequence):
    """Let the worker compute and push lease `sequence`; return what it sends with its push, and after the answer."""
    pieces = ((np.ones(2, np.float32),),)
    sent, _ = worker.handle(messages.Computed(1, sequence, 6.0, 6.0, True, 0.0, pieces, ()), 1.0)
    answer, _ = worker.handle(messages.PushAck(0, 0, 1, sequence, "staged"), 1.0)
    return ({type(message).__name__: message for _, message in each} for each in (sent, answer))


def grant(worker, sequence, step, now=2.0):
    """Grant the examples of `step`; return (messages, names of effects)."""
    sent, todo = worker.handle(messages.Grant(0, 1, 1, sequence, 0, messages.Lease(step, 0, 0, 0, 6)), now)
    return sent, [type(effect).__name__ for effect in todo]


def synchronous():
    worker = Worker(worker=0, boot=10, settings=Settings(num_examples=20, global_batch_size=6, max_steps=9))
    join(worker, 1, 1)
    compute(worker, 1, 1)
    return worker


def pulled(sequence, version):
    return messages.Pulled(0, 0, 1, sequence, version, (np.zeros(2, np.float32),))


def test_a_push_and_its_report_leave_together_and_the_params_of_the_next_step_come_without_a_request():
    worker = synchronous()
    sent, answer = push_all(worker, 1)
    assert (sent["Push"].sequence, sent["Done"].sequence, sent["Done"].staged) == (1, 1, False)
    assert set(sent) == {"Push", "Done"}
    assert answer == {}
    assert worker.handle(pulled(2, 1), 1.5) == ([], [])
    _, todo = grant(worker, 2, 1)
    assert todo == ["Prepare", "Compute"]


def test_a_grant_says_that_the_push_arrived_even_before_its_answer():
    worker = synchronous()
    worker.handle(messages.Computed(1, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ()), 1.0)
    worker.handle(pulled(2, 1), 1.5)
    assert grant(worker, 2, 1)[1] == ["Prepare", "Compute"]
    assert worker.handle(messages.PushAck(0, 0, 1, 1, "staged"), 2.0) == ([], [])
    assert worker.phase == "computing"


def test_a_worker_that_is_to_report_says_at_once_that_all_shards_have_its_push():
    worker = Worker(worker=0, boot=10, settings=Settings(num_examples=20, global_batch_size=6, max_steps=9, workers=2))
    join(worker, 1, 1)
    worker.handle(messages.Grant(0, 1, 1, 1, 0, LEASE, report=True), 0.0)
    worker.handle(messages.Pulled(0, 0, 1, 1, 0, (np.zeros(2, np.float32),)), 0.0)
    _, answer = push_all(worker, 1)
    assert answer["Done"].staged


def test_a_change_of_membership_makes_a_worker_report():
    worker = synchronous()
    worker.handle(membership(2, 1), 0.5)
    _, answer = push_all(worker, 1)
    assert answer["Done"].staged


def test_the_examples_of_the_next_step_are_read_while_the_push_travels():
    worker = synchronous()
    _, todo = worker.handle(messages.Computed(1, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ()), 1.0)
    assert todo == [effects.Prepare(messages.Lease(1, 0, 0, 6, 12))]


def test_nothing_is_read_beyond_the_last_step():
    worker = synchronous()
    worker.lease = messages.Lease(8, 0, 2, 0, 6)
    _, todo = worker.handle(messages.Computed(1, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ()), 1.0)
    assert todo == []


def test_a_worker_that_is_granted_nothing_says_itself_that_all_shards_have_its_push():
    """What a shard told the scheduler may be lost."""
    worker = synchronous()
    push_all(worker, 1)
    said, _ = worker.handle(messages.Tick(), 1.0 + SETTINGS.timers.retry)
    assert [m.staged for _, m in said if isinstance(m, messages.Done)] == [True]


def test_a_grant_that_is_faster_than_the_params_waits_for_them_and_asks_again_only_after_a_while():
    worker = synchronous()
    push_all(worker, 1)
    sent, todo = grant(worker, 2, 1)
    assert (sent, todo) == ([], ["Prepare"])
    late, _ = worker.handle(messages.Tick(), 2.0 + SETTINGS.timers.retry)
    assert [(m.sequence, m.version) for _, m in late if isinstance(m, messages.Pull)] == [(2, 1)]
    _, todo = worker.handle(pulled(2, 1), 4.0)
    assert any(isinstance(effect, effects.Compute) for effect in todo)


@pytest.mark.parametrize("first", ["the params", "the lease"])
def test_params_from_ahead_of_the_commit_are_used_if_it_names_their_pushes(first):
    worker = synchronous()
    push_all(worker, 1)
    told = [
        dataclasses.replace(pulled(2, 1), ahead=7),
        messages.Grant(0, 1, 1, 2, 0, messages.Lease(1, 0, 0, 0, 6), made_of=7),
    ]
    for message in told if first == "the params" else reversed(told):
        sent, todo = worker.handle(message, 2.0)
        assert sent == []
    assert isinstance(todo[-1], effects.Compute)


@pytest.mark.parametrize("made_of", [0, 8])
@pytest.mark.parametrize("first", ["the params", "the lease"])
def test_params_from_ahead_of_a_commit_of_other_pushes_are_not_used(first, made_of):
    worker = synchronous()
    push_all(worker, 1)
    told = [
        dataclasses.replace(pulled(2, 1), ahead=7),
        messages.Grant(0, 1, 1, 2, 0, messages.Lease(1, 0, 0, 0, 6), made_of=made_of),
    ]
    for message in told if first == "the params" else reversed(told):
        assert not any(isinstance(each, effects.Compute) for each in worker.handle(message, 2.0)[1])
    assert worker.phase == "pulling"
    _, todo = worker.handle(pulled(2, 1), 2.5)
    assert isinstance(todo[-1], effects.Compute)


def test_params_that_came_early_for_another_step_are_not_used():
    """With backup workers, a step may be committed without this worker, which is granted a later one."""
    worker = synchronous()
    push_all(worker, 1)
    worker.handle(pulled(2, 1), 1.5)
    sent, todo = grant(worker, 2, 3)
    assert todo == ["Prepare"]
    assert [m.version for _, m in sent if isinstance(m, messages.Pull)] == [3]


def test_a_worker_whose_push_was_too_late_asks_for_params():
    """The servers have dropped the push, and what it asked for with it."""
    worker = synchronous()
    worker.handle(messages.Computed(1, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ()), 1.0)
    worker.handle(messages.PushAck(0, 0, 1, 1, "obsolete"), 1.0)
    sent, _ = grant(worker, 2, 1)
    assert [(m.sequence, m.version) for _, m in sent if isinstance(m, messages.Pull)] == [(2, 1)]


def test_params_that_came_early_are_enough_although_a_copy_of_the_push_was_too_late():
    """The push was sent twice: the second came after its step was committed, and was answered first."""
    worker = synchronous()
    worker.handle(messages.Computed(1, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ()), 1.0)
    worker.handle(pulled(2, 1), 1.5)
    worker.handle(messages.PushAck(0, 0, 1, 1, "obsolete"), 1.6)
    sent, todo = grant(worker, 2, 1)
    assert not any(isinstance(m, messages.Pull) for _, m in sent)
    assert "Compute" in todo


def test_nothing_is_pulled_early_where_the_next_version_is_not_known():
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    join(worker, 1, 1)
    compute(worker, 1, 1)
    sent, answer = push_all(worker, 1)
    assert set(sent) == {"Push"}
    assert set(answer) == {"Done"}
    assert answer["Done"].staged


def test_a_worker_that_is_asked_to_leave_finishes_its_lease_first():
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    join(worker, 1, 1)
    compute(worker, 1, 1)
    leave = effects.Send(SCHEDULER, messages.Leave("worker/0", 10))
    assert worker.handle(messages.Retire(), 0.5) == ([], [])
    _, answer = push_all(worker, 1)
    assert "Done" in answer
    sent, _ = worker.handle(messages.DoneAck(0, 1, 1), 2.0)
    assert sent == [leave]
    sent, _ = worker.handle(messages.Tick(), 4.0)
    assert leave in sent  # until it is answered
    _, (end,) = worker.handle(messages.Fenced("worker/0", 10), 4.1)
    assert (end.step, end.reason) == (0, effects.LEFT)


@pytest.mark.parametrize("joined", [False, True])
def test_a_worker_without_a_lease_leaves_at_once(joined):
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    if joined:
        join(worker, 1, 1)
    sent, _ = worker.handle(messages.Retire(), 0.5)
    assert sent == [effects.Send(SCHEDULER, messages.Leave("worker/0", 10))]
    # A lease that was granted before the scheduler knew is not computed.
    assert worker.handle(messages.Grant(0, 1, 1, 1, 0, LEASE), 0.6) == ([], [])


def test_a_lease_that_comes_with_the_answer_to_the_last_report_is_not_computed():
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    join(worker, 1, 1)
    compute(worker, 1, 1)
    worker.handle(messages.Retire(), 0.5)
    push_all(worker, 1)
    sent, done = grant(worker, 2, 1)
    assert sent == [effects.Send(SCHEDULER, messages.Leave("worker/0", 10))]
    assert done == []


def test_a_leaving_worker_that_was_dropped_meanwhile_does_not_join_again():
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    join(worker, 1, 1)
    compute(worker, 1, 1)
    worker.handle(messages.Retire(), 0.5)
    worker.handle(messages.Computed(1, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ()), 1.0)
    sent, _ = worker.handle(messages.PushAck(0, 0, 1, 1, "fenced"), 1.0)
    assert sent == [effects.Send(SCHEDULER, messages.Leave("worker/0", 11))]


def test_a_worker_stops_once_and_says_so_each_time():
    worker = synchronous()
    stop, told = messages.StopRun(7, "max_steps"), [effects.Send(SCHEDULER, messages.StopAck("worker/0"))]
    assert worker.handle(stop, 2.0) == (told, [effects.Exit(7, "max_steps")])
    assert worker.handle(stop, 3.0) == (told, [])


def test_a_lease_is_returned_as_long_as_its_params_have_not_arrived():
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    join(worker, 1, 1)
    worker.handle(messages.Grant(0, 1, 1, 1, 0, LEASE), 0.0)
    for other in (messages.Revoke(0, 2, 1), messages.Revoke(0, 1, 2)):  # of another life, and of another lease
        assert worker.handle(other, 0.5) == ([], [])
    (sent,), _ = worker.handle(messages.Revoke(0, 1, 1), 1.0)
    assert sent == effects.Send(SCHEDULER, messages.Ask(0, 1, 1))
    assert worker.lease is None
    worker.handle(messages.Grant(0, 1, 1, 2, 0, LEASE), 2.0)
    worker.handle(messages.Pulled(0, 0, 1, 2, 0, (np.zeros(2, np.float32),)), 2.0)
    assert worker.handle(messages.Revoke(0, 1, 2), 3.0) == ([], []), "it computes already"


def test_params_of_a_step_that_was_committed_without_this_lease_release_it():
    chosen = Settings(num_examples=20, global_batch_size=6, max_steps=9)
    worker = Worker(worker=0, boot=10, settings=chosen)
    join(worker, 1, 1)
    worker.handle(messages.Grant(0, 1, 1, 1, 0, LEASE), 0.0)
    (sent,), todo = worker.handle(pulled(1, 1), 1.0)
    assert (sent, todo) == (effects.Send(SCHEDULER, messages.Ask(0, 1, 1)), [])
    assert worker.lease is None


def test_an_older_membership_is_ignored_and_a_newer_one_is_answered():
    worker = synchronous()
    assert worker.handle(membership(1, 1), 2.0) == ([], [])
    (beat,), _ = worker.handle(membership(2, 1), 2.0)
    assert (beat.to, beat.message.term) == (SCHEDULER, 2)


COMPUTED = messages.Computed(1, 1, 6.0, 6.0, True, 0.0, ((np.ones(2, np.float32),),), ())
ANSWERS = {
    "joining": messages.Welcome("worker/0", 10, 1, membership(1, 1)),
    "asking": messages.Grant(0, 1, 1, 1, 0, LEASE),
    "pulling": pulled(1, 0),
    "computing": COMPUTED,
    "pushing": messages.PushAck(0, 0, 1, 1, "applied"),
    "reporting": messages.DoneAck(0, 1, 1),
}
"""What ends each phase of the first lease."""
PHASES = [*ANSWERS, "leaving", "stopped"]


def reach(phase):
    """Return a worker in this phase, of its first lease if it has one."""
    worker = Worker(worker=0, boot=10, settings=SETTINGS)
    if phase == "stopped":
        worker.handle(messages.StopRun(0, "max_steps"), 0.0)
    elif phase == "leaving":
        worker.handle(messages.Retire(), 0.0)
    else:
        for before, answer in ANSWERS.items():
            if before == phase:
                break
            worker.handle(answer, 0.0)
    assert worker.phase == phase
    return worker


def of_others(worker):
    """Return messages about another start, another life, another term or another lease of this worker."""
    boot, term, incarnation, last = worker.boot, worker.term, worker.incarnation, worker.sequence
    lives = ((incarnation + 6, last), (incarnation + 6, last + 1), (incarnation, last - 1), (incarnation, last + 5))
    about_leases = (
        dataclasses.replace(answer, incarnation=life, sequence=sequence)
        for answer in (pulled(1, 0), COMPUTED, ANSWERS["pushing"], ANSWERS["reporting"], messages.Revoke(0, 1, 1))
        for life, sequence in lives
    )
    grants = ((incarnation + 6, term, last + 1), (incarnation, term - 1, last + 1), (incarnation, term, last))
    return [
        *about_leases,
        *(messages.Grant(0, *each, 0, LEASE) for each in grants),
        messages.Welcome(worker.name, boot + 1, 7, membership(9, 7)),
        messages.Fenced(worker.name, boot - 1),
        membership(term, incarnation),
    ]


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_about_another_life_or_lease_changes_nothing(phase):
    worker = reach(phase)
    before = repr(vars(worker))
    for message in of_others(worker):
        assert worker.handle(message, 0.5) == ([], []), message
        assert repr(vars(worker)) == before, message


@pytest.mark.parametrize("phase", PHASES)
def test_an_answer_that_comes_again_changes_nothing(phase):
    worker = reach(phase)
    before = repr(vars(worker))
    for waiting, answer in ANSWERS.items():
        if waiting == phase:
            break
        assert worker.handle(answer, 0.5) == ([], []), answer
        assert repr(vars(worker)) == before, answer


def test_every_answer_is_progress_and_a_life_begins_without_any():
    worker = reach("joining")
    for number, answer in enumerate(ANSWERS.values()):
        before = worker.progress
        worker.handle(answer, 0.0)
        assert worker.progress > before, answer
        if number == 0:
            beat = next(
                each.message for each in worker.handle(messages.Tick(), 5.0)[0] if hasattr(each.message, "clock")
            )
            assert (beat.sequence, beat.clock, beat.lease) == (0, 0, None)


def test_a_newer_membership_has_the_open_request_sent_again():
    """A shard may be served by another process now."""
    sent, _ = reach("pulling").handle(membership(2, 1), 0.5)
    assert [type(each.message).__name__ for each in sent] == ["Heartbeat", "Pull"]


def test_examples_that_are_read_ahead_are_not_read_again():
    worker = synchronous()
    push_all(worker, 1)
    next_slice = messages.Lease(1, 0, 0, 6, 12)
    assert worker.handle(messages.Grant(0, 1, 1, 2, 0, next_slice), 2.0) == ([], [])


def test_a_leaving_worker_says_itself_that_all_shards_have_its_push():
    worker = synchronous()
    worker.handle(messages.Retire(), 0.5)
    _, answer = push_all(worker, 1)
    assert answer["Done"].staged


def test_a_stopped_worker_says_nothing_more():
    assert reach("stopped").handle(messages.Tick(), 100.0) == ([], [])

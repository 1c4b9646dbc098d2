import dataclasses
import datetime
import uuid

import pytest

from jaxdist.rundir.lock import LockedError
from jaxdist.rundir.remote import job_object, run_store
from jaxdist.rundir.remote.run_address import Address


@pytest.fixture
def store():
    return run_store.open_store(Address(f"memory://{uuid.uuid4().hex}/run"))


def take(store, *, waits=False, sleep=lambda seconds: None):
    return job_object.take(store, "test", waits=waits, say=lambda line: None, sleep=sleep)


def elsewhere(**changes):
    """Return a living job of another machine."""
    return dataclasses.replace(job_object.JobOwner.this("theirs"), machine="another", host="node9", **changes)


def test_a_second_job_is_refused_and_told_who_has_the_directory(store):
    first = take(store)
    with pytest.raises(LockedError, match=r"process \d+ on .*\(test\)"):
        take(store)
    first.release()
    assert store.sizes() == {}
    take(store).release()


def test_a_killed_process_of_this_machine_holds_nothing(store):
    store.create(job_object.NAME, dataclasses.replace(job_object.JobOwner.this("killed"), process=2**22 + 1).to_bytes())
    take(store).release()


def test_what_another_machine_does_not_renew_is_taken_over_by_who_waits(store):
    store.create(job_object.NAME, elsewhere().to_bytes())
    waited = []
    with pytest.raises(LockedError):
        take(store)
    take(store, waits=True, sleep=waited.append).release()
    assert sum(waited) == pytest.approx(job_object.STALE_SECONDS, abs=2)


def test_what_another_machine_renews_is_not_taken_over(store):
    owner = elsewhere()
    store.create(job_object.NAME, owner.to_bytes())
    renewals = iter([None, None, owner.renewed_now()])

    def sleep(seconds):
        if found := next(renewals):
            store.write(job_object.NAME, found.to_bytes())

    with pytest.raises(LockedError, match="node9"):
        take(store, waits=True, sleep=sleep)


def test_what_was_not_renewed_for_long_is_taken_over_at_once(store):
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    store.create(job_object.NAME, elsewhere(renewed=long_ago.isoformat()).to_bytes())
    take(store).release()


@pytest.mark.parametrize("theirs", ["another job", "nothing"])
def test_a_job_notices_that_it_lost_the_directory_and_leaves_it_alone(store, theirs):
    lock = take(store)
    store.remove(job_object.NAME)
    if theirs == "another job":
        store.write(job_object.NAME, elsewhere().to_bytes())
    assert not lock.is_ours()
    lock.release()
    assert (job_object.NAME in store.sizes()) == (theirs == "another job")


def test_a_lock_that_cannot_be_read_is_of_a_living_job(store):
    store.write(job_object.NAME, b"{")
    with pytest.raises(LockedError):
        take(store)


def test_the_lock_is_renewed_by_its_thread(store, monkeypatch):
    monkeypatch.setattr(job_object, "RENEW_SECONDS", 0.01)
    lock = take(store)
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=10)
    while job_object.owner_of(store).count < 2:
        assert datetime.datetime.now() < deadline
    lock.release()

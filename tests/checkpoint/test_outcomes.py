"""A save ends well on all processes of a job, or all of them raise."""

import concurrent.futures
import itertools
import queue

import jax
import pytest

from jaxdist.checkpoint import outcomes
from jaxdist.checkpoint.outcomes import CheckpointError, NoRoomError
from jaxdist.spmd import jax_private

COUNT = 3


class Store:
    """The coordinator's store, of which each key is read as often as there are other processes, at most."""

    def __init__(self):
        self.told, self.deleted = {}, []

    def key_value_set(self, key, text):
        for _ in range(COUNT):
            self._queue(key).put(text)

    def blocking_key_value_get(self, key, milliseconds):
        return self._queue(key).get(timeout=milliseconds / 1000)

    def key_value_delete(self, prefix):
        self.deleted.append(prefix)

    def _queue(self, key):
        return self.told.setdefault(key, queue.Queue())


@pytest.fixture
def store(monkeypatch):
    made = Store()
    monkeypatch.setattr(jax_private, "coordinator_store", lambda: made)
    monkeypatch.setattr(jax, "process_count", lambda: COUNT)
    return made


def of_all_processes(monkeypatch, number=0):
    """Return the outcomes of one save, one for each process."""
    made = []
    for process in range(COUNT):
        monkeypatch.setattr(outcomes, "_SAVES", itertools.count(number))
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        made.append(outcomes.Outcomes())
    return made


def raised(calls):
    """Return what each call raises, None for nothing, when all of them run together."""
    with concurrent.futures.ThreadPoolExecutor(COUNT) as threads:
        return [future.exception(60) for future in [threads.submit(call) for call in calls]]


def failing(error):
    def act():
        raise error

    return act


def nothing():
    pass


@pytest.mark.parametrize("kind", [NoRoomError, CheckpointError])
def test_what_fails_on_the_first_process_is_raised_on_every_one(store, monkeypatch, kind):
    processes = of_all_processes(monkeypatch)
    errors = raised([lambda each=each: each.of_first(failing(kind("the disk"))) for each in processes])
    assert [(type(error), str(error)) for error in errors] == [(kind, "the disk")] * COUNT
    assert raised([lambda each=each: each.of_first(nothing) for each in of_all_processes(monkeypatch, 1)]) == [None] * 3


@pytest.mark.parametrize("bad", range(COUNT))
def test_what_fails_on_one_process_is_raised_on_every_one_and_nothing_is_committed(store, monkeypatch, bad):
    committed = []
    acts = [failing(OSError(28, "No space left")) if process == bad else nothing for process in range(COUNT)]
    processes = of_all_processes(monkeypatch)
    errors = raised(
        [lambda each=each, act=act: each.of_all(act, lambda: committed.append(1)) for each, act in zip(processes, acts)]
    )
    assert all("No space left" in str(error) for error in errors)
    assert not committed


def test_the_first_process_commits_once_and_tells_whether_it_could(store, monkeypatch):
    committed = []
    for number, (then, expected) in enumerate(
        [(lambda: committed.append(1), "None"), (failing(CheckpointError("renaming failed")), "renaming failed")]
    ):
        processes = of_all_processes(monkeypatch, number)
        errors = raised([lambda each=each, then=then: each.of_all(nothing, then) for each in processes])
        assert [str(error) for error in errors] == [expected] * COUNT
    assert committed == [1]


def test_what_nobody_reads_any_more_is_deleted(store, monkeypatch):
    for number in range(4):
        of_all_processes(monkeypatch, number)
    assert store.deleted == ["jaxdist/checkpoint/0/", "jaxdist/checkpoint/1/"]


def test_one_process_needs_no_store(monkeypatch):
    monkeypatch.setattr(jax_private, "coordinator_store", lambda: pytest.fail("it was asked for"))
    made, calls = outcomes.Outcomes(), []
    made.of_first(lambda: calls.append(1))
    made.of_all(lambda: calls.append(2), lambda: calls.append(3))
    assert calls == [1, 2, 3]
    with pytest.raises(OSError, match="own"):
        made.of_all(failing(OSError("own")), lambda: calls.append(4))
    assert calls == [1, 2, 3]

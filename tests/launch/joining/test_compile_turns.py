import threading

import compile_cache
import jax
import pytest

from jaxdist.launch.joining import compile_turns


@pytest.fixture
def cache(tmp_path):
    with compile_cache.compile_once(tmp_path / "xla"):
        yield tmp_path


def test_the_second_has_its_turn_when_the_first_is_done(cache):
    order, has_begun = [], threading.Event()

    def second():
        has_begun.set()
        with compile_turns.turn("key"):
            order.append("second")

    with compile_turns.turn("key"):
        thread = threading.Thread(target=second)
        thread.start()
        assert has_begun.wait(60)
        with compile_turns.turn("another key"):
            order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_a_turn_that_is_not_given_back_is_waited_for_no_longer_than_the_limit(cache, monkeypatch):
    monkeypatch.setattr(compile_turns, "WAIT_SECONDS", 0.05)
    with compile_turns.turn("key"), compile_turns.turn("key"):
        pass


@pytest.mark.parametrize("where", [None, "gs://bucket/cache", "/dev/null/cache"])
def test_without_a_folder_for_locks_there_are_no_turns(where, monkeypatch):
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", where)
    with compile_turns.turn("key"), compile_turns.turn("key"):
        pass

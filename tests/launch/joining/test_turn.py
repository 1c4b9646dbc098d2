"""A process in reserve waits until it is its turn."""

import json
import os
import threading

import pytest

from jaxdist.launch.joining import turn


@pytest.fixture
def directory(tmp_path):
    os.mkfifo(turn.pipe_path(tmp_path, 1))
    return tmp_path


def test_it_waits_until_told_and_takes_the_environment_of_the_attempt(directory, monkeypatch):
    monkeypatch.setenv("JAXDIST_TOLD", "before")
    pipe = os.open(turn.pipe_path(directory, 1), os.O_RDWR)
    seen = []

    def tell():
        while not turn.ready_path(directory, 1).exists():
            pass
        seen.append(os.environ["JAXDIST_TOLD"])
        os.write(pipe, json.dumps({"JAXDIST_TOLD": "now"}).encode())

    thread = threading.Thread(target=tell)
    thread.start()
    turn.Turn(directory, 1, None).wait()
    thread.join()
    os.close(pipe)
    assert (seen, os.environ["JAXDIST_TOLD"]) == (["before"], "now")


def test_a_process_that_prepares_itself_can_see_that_its_turn_has_come(directory):
    waiting, pipe = turn.Turn(directory, 1, None), os.open(turn.pipe_path(directory, 1), os.O_RDWR)
    assert not waiting.has_come()
    os.write(pipe, b"{}")
    assert waiting.has_come()
    assert waiting.has_come(), "the word is left for wait"
    waiting.wait()
    assert not waiting.has_come()
    os.close(pipe)


def test_its_output_is_shown_from_its_turn_on(directory, capfd):
    pipe = os.open(turn.pipe_path(directory, 1), os.O_RDWR)
    os.write(pipe, b"{}")
    # capfd replaces the descriptors 1 and 2, and Python's own streams write to these.
    with capfd.disabled():
        out, err = os.dup(1), os.dup(2)
        try:
            log, shown = directory / "log", directory / "shown"
            with open(shown, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            waiting = turn.Turn(directory, 1, log)
            print("early", flush=True)
            waiting.wait()
            print("in time", flush=True)
        finally:
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
            os.close(pipe)
    assert (log.read_text(), shown.read_text()) == ("early\n", "in time\n")


def test_a_process_that_is_not_in_reserve_has_no_turn():
    assert turn.Turn.of_process({}) is None

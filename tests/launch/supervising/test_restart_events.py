"""The file restarts.jsonl."""

import json

import pytest

from jaxdist.launch.supervising import restart_events


def test_events_are_read_as_they_were_noted_without_an_incomplete_line(tmp_path):
    events = restart_events.Events(tmp_path)
    assert events.failed_at is None
    events.note("start", attempt=0, process_ids=[7])
    events.note("end", attempt=0, status=75)
    with open(tmp_path / restart_events.EVENTS_NAME, "a") as file:
        file.write('{"event": "sta')
    start, end = restart_events.read_events(tmp_path)
    assert (start["event"], start["process_ids"], end["status"]) == ("start", [7], 75)
    assert start["monotonic"] <= end["monotonic"]
    assert events.failed_at == end["monotonic"]


def test_a_line_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, capfd):
    events = restart_events.Events(tmp_path / "gone")
    events.note("start")
    events.note("end")
    assert capfd.readouterr().err.count("The job continues without it.") == 1
    assert restart_events.read_events(tmp_path / "gone") == []


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "sta',
        "[]",
        '{"event": ["start"], "time": 1.0, "monotonic": 1.0}',
        '{"event": "end", "time": "now", "monotonic": 1.0}',
        '{"event": "end", "attempt": 0}',
        '{"event": "end", "time": 1.0, "monotonic": 1.0}',
        '{"event": "start", "time": 1.0, "monotonic": 1.0, "attempt": 0}',
        '{"event": "start", "time": 1.0, "monotonic": 1.0, "process_ids": [1]}',
        '{"event": "start", "time": 1.0, "monotonic": 1.0, "attempt": 1, "process_ids": [1], "cause": "join"}',
        '{"event": "recovered", "time": 1.0, "monotonic": 1.0, "step": 6}',
        '{"event": "recovered", "time": 1.0, "monotonic": 1.0, "seconds": 2.5}',
    ],
)
def test_a_line_that_is_damaged_or_incomplete_hides_no_other(tmp_path, line):
    whole = {"event": "end", "time": 2.0, "monotonic": 2.0, "attempt": 0}
    (tmp_path / restart_events.EVENTS_NAME).write_text(f"{line}\n{json.dumps(whole)}\n")
    found = restart_events.read_events(tmp_path)
    assert found == [whole]
    assert restart_events.changes(found) == []


def test_each_change_has_what_it_cost(tmp_path):
    events = restart_events.Events(tmp_path)
    events.note("start", attempt=0, process_ids=[1])
    events.note("start", attempt=1, process_ids=[2], cause="restart", reached=5)
    events.note("start", attempt=2, process_ids=[3, 4], cause="join", reached=5)
    events.note("recovered", step=6, seconds=2.5)
    events.note("end", attempt=2, status=0)
    assert restart_events.changes(restart_events.read_events(tmp_path)) == [
        {"kind": "restart", "step": 5, "processes": 1, "seconds_lost": None},
        {"kind": "join", "step": 5, "processes": 2, "seconds_lost": 2.5},
    ]

"""The file restarts.jsonl."""

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

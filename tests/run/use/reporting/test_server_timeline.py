"""The picture of a parameter-server run."""

import copy
import functools
import json
import xml.etree.ElementTree as ET

import pytest

from jaxdist.run.use.reporting import server_timeline


def history(series, *, began=1000.0, width=0.5, **content):
    empty = {"leases": [], "lost": [], "events": [], "omitted": 0, "written": 1010.0}
    return empty | {"bins": {"began": began, "width": width, "series": series}} | content


SCHEDULER = history(
    {"steps": [0.0, 2.0, 4.0], "worker/0": [0.0, 0.5, 0.5], "worker/1": [0.0, 0.5]},
    leases=[[0, 4, 0, 1001.0, 1002.0, "done"], [1, 4, 1, 1001.0, 1001.5, "returned"]],
    lost=[[1, 5, 1, 1002.0, 1003.0, "lost"]],
    events=[[1000.5, "join", "worker 0 joined"], [1003.0, "leave", "worker 1 left"]],
)
WORKER = history({"computing": [0.0, 0.25]}, leases=[[0, 4, 0, 1001.0, 0.2, 0.5, 0.25]])


def titles(picture):
    return [element.text for element in ET.fromstring(picture).iter() if element.tag.endswith("title")]


def test_each_lease_is_named_with_its_phases_and_what_became_of_it():
    found = titles(server_timeline.draw({"scheduler": SCHEDULER, "worker-0": WORKER}))
    assert "worker 0, step 5, slice 0, 1 s, pull 200 ms, compute 500 ms, push 250 ms, done" in found
    assert "worker 1, step 5, slice 1, 500 ms, returned" in found
    assert "worker 1, step 6, slice 1, 1 s, lost" in found
    assert "worker 1 left at 3 s" in found
    assert "worker 0: held a lease 10% of the time" in found


def test_staleness_and_repeated_requests_are_drawn_where_there_are_any():
    plain = server_timeline.draw({"scheduler": SCHEDULER})
    assert "mean staleness" not in plain
    assert "sent again" not in plain
    server = history({"updates": [4.0], "staleness": [6.0]})
    again = history({"again": [3.0]})
    picture = server_timeline.draw({"scheduler": SCHEDULER, "server-0-a": server, "worker-1": again})
    texts = [element.text for element in ET.fromstring(picture).iter() if element.tag.endswith("text")]
    assert {"mean staleness", "1.5", "sent again", "3"} <= set(texts)


@pytest.mark.parametrize(("width", "count"), [(0.25, 12), (0.5, 6), (2.0, 2)])
def test_other_bins_have_the_same_sum(width, count):
    bins = {"began": 1000.25, "width": 0.5, "series": {"steps": [1.0, 2.0, 3.0]}}
    found = server_timeline.resample(bins, "steps", 1000.0, width, count)
    assert sum(found) == pytest.approx(6.0)
    assert len(found) == count
    if width == 0.25:
        assert found[:7] == pytest.approx([0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5])


def test_the_picture_of_many_workers_and_events_stays_small():
    rows = [[worker, step, worker, 1000.0, 1001.0, "done"] for step in range(9) for worker in range(256)]
    series = {f"worker/{worker}": [0.5] * 240 for worker in range(256)} | {"steps": [1.0] * 240}
    events = [[1000.0 + number / 100, "join", f"worker {number} joined"] for number in range(400)]
    many = history(series, leases=rows, events=events, omitted=7, written=1120.0)
    picture = server_timeline.draw({"scheduler": many})
    assert len(picture) < 2_000_000
    assert len([each for each in titles(picture) if ", slice " in each]) == server_timeline.MOST_LEASES
    assert "more events" in picture


def test_a_run_without_a_parameter_server_has_no_picture(tmp_path):
    assert server_timeline.draw(server_timeline.read(tmp_path)) == ""
    folder = tmp_path / server_timeline.HISTORIES
    folder.mkdir(parents=True)
    (folder / "scheduler.json").write_text(json.dumps(SCHEDULER))
    (folder / "worker-0.json").write_text("{")
    assert list(server_timeline.read(tmp_path)) == ["scheduler"]


def _with(path, value):
    """Return the history of the scheduler with another value at a path of keys."""
    found = copy.deepcopy(SCHEDULER)
    inner = functools.reduce(lambda part, key: part[key], path[:-1], found)
    inner[path[-1]] = value
    return found


DAMAGED = [
    None,
    [1, 2],
    {},
    {**SCHEDULER, "bins": {}},
    _with(("bins", "width"), 0.0),
    _with(("bins", "width"), 1e-300),
    _with(("bins", "began"), "1000"),
    _with(("bins", "series", "steps"), [0.0, "2"]),
    _with(("bins", "series", "steps"), [1e300]),
    _with(("bins", "series", "worker/x"), [0.0]),
    _with(("leases", 0), [0, 4, 0]),
    _with(("leases", 0, 5), "><script>"),
    _with(("lost", 0, 3), None),
    _with(("events", 0, 1), '"><script>'),
    _with(("events", 0, 0), 1e300),
    _with(("written",), 1e11),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_history_is_omitted(tmp_path, content):
    folder = tmp_path / server_timeline.HISTORIES
    folder.mkdir(parents=True)
    (folder / "scheduler.json").write_text(json.dumps(content))
    (folder / "worker-0.json").write_text(json.dumps(WORKER))
    (folder / "worker-x.json").write_text(json.dumps(WORKER))
    assert server_timeline.read(tmp_path) == {"worker-0": WORKER}
    (folder / "worker-0.json").write_text(json.dumps(content))
    (folder / "scheduler.json").write_text(json.dumps(SCHEDULER))
    assert titles(server_timeline.draw(server_timeline.read(tmp_path)))

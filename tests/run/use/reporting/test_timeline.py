"""The picture of a job's processes over time."""

import xml.etree.ElementTree as ET

from jaxdist.run.use.reporting import timeline


def event(kind, time, **details):
    return {"event": kind, "monotonic": time} | details


JOB = [
    event("start", 100.0, attempt=0, process_ids=[1]),
    event("end", 110.0, attempt=0, saved=50),
    event("start", 110.5, attempt=1, process_ids=[2, 3, 4, 5], cause="join", reached=50),
    event("recovered", 112.0, step=51, seconds=2.5),
    event("end", 120.0, attempt=1, saved=200),
]


def test_the_picture_is_one_of_the_last_job_and_names_each_change():
    earlier = [event("start", 5000.0, attempt=0, process_ids=list(range(9)))]
    picture = timeline.draw([*earlier, *JOB])
    texts = [element.text for element in ET.fromstring(picture).iter() if element.tag.endswith("text")]
    assert "join at step 50: 2.5 s" in texts
    assert {"4", "200", "20 s"} <= set(texts)
    assert picture == timeline.draw(JOB)


def test_lines_follow_the_processes_and_the_steps():
    assert timeline._processes(JOB) == [
        (100.0, 0), (100.0, 1), (110.0, 1), (110.0, 0), (110.5, 0), (110.5, 4), (120.0, 4), (120.0, 0), (120.0, 0),
    ]  # fmt: skip
    assert timeline._steps(JOB) == [(100.0, 0), (109.5, 50), (112.0, 51), (120.0, 200)]
    assert timeline._standstills(JOB) == [(109.5, 112.0, "join at step 50: 2.5 s")]


def test_a_run_without_a_supervisor_has_no_picture():
    assert timeline.draw([]) == ""
    assert timeline.draw([event("end", 1.0)]) == ""

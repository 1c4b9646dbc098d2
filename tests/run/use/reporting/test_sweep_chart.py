"""The chart and the table of a sweep: places on axes, ticks that do not touch, and text that is safe."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported_runs import write_run

from jaxdist.run.sweeps import sweep_record
from jaxdist.run.use.reporting import report_page, sweep_chart

POSITIVE = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


@given(POSITIVE)
def test_numbers_are_in_order_on_their_axis_and_ticks_apart(numbers):
    values = [f"{number:.4g}" for number in numbers]
    found = sweep_chart.axis("rate", values)
    assert all(0 <= place <= 1 for place in found["places"])
    by_number = sorted(zip(map(float, values), found["places"], strict=True))
    assert [place for _, place in by_number] == sorted(found["places"])
    places = [place for place, _ in found["ticks"]]
    assert all(after - before >= 0.06 for before, after in itertools.pairwise(places))
    assert len(places) <= 6


def test_decades_are_equally_far_apart_and_names_too():
    assert sweep_chart.axis("rate", ["1e-4", "1e-3", "1e-2"])["places"] == [0, 0.5, 1]
    assert sweep_chart.axis("width", ["32", "48", "64"])["places"] == [0, 0.5, 1]
    assert sweep_chart.axis("name", ["sgd", "adam", "lion"])["places"] == [1, 0, 0.5]
    assert sweep_chart.axis("name", ["sgd", "1"])["ticks"] == [[0, "1"], [1, "sgd"]]
    assert sweep_chart.axis("one", ["7"]) == {"name": "one", "places": [0.5], "ticks": [[0.5, "7"]]}


@pytest.fixture
def sweep_dir(tmp_path):
    settings = [
        {"optimizer.name": "<b>adam</b>", "w": "1"},
        {"optimizer.name": "sgd", "w": "2"},
        {"optimizer.name": "x", "w": "3"},
    ]
    trials = [sweep_record.Trial.make(number, each) for number, each in enumerate(settings)]
    trials[2].refused = "there is no <x>"
    over = ["optimizer.name=a", "w=1"]
    sweep_record.Sweep("tiny", [], over, "grid", 3, 0, "eval/accuracy", "max", trials).write(tmp_path)
    for trial, value in zip(trials[:2], (0.5, 0.75), strict=True):
        write_run(tmp_path / trial.name, metrics={"eval/accuracy": value})
    return tmp_path


def test_the_chart_has_a_line_for_each_trial_with_a_value_and_the_best_last(sweep_dir):
    found = sweep_chart.chart(*sweep_chart.read([sweep_dir]))
    assert [axis["name"] for axis in found["axes"]] == ["name", "w", "eval/accuracy"]
    assert [line["quality"] for line in found["lines"]] == [0, 1]
    assert found["lines"][-1]["text"] == ["1.", "name sgd", "w 2", "eval/accuracy 0.75 at step 3"]
    assert [len(line["y"]) for line in found["lines"]] == [3, 3]


def test_the_page_of_a_sweep_has_its_runs_its_ranking_and_the_best_command(sweep_dir):
    found = report_page.content([sweep_dir])
    assert [run["name"][:3] for run in found["runs"]] == ["000", "001"]
    table = found["parts"]["sweep"]
    assert "&lt;b&gt;adam&lt;/b&gt;" in table
    assert "<b>adam" not in table
    assert 'title="there is no &lt;x&gt;"' in table
    assert "jaxdist train x.py --set a=1</code>" in table
    page = report_page.make([sweep_dir])
    assert f"<title>Sweep {sweep_dir.name}</title>" in page
    assert '<script type="application/json" id="sweep">{"axes":' in page


def test_a_report_on_runs_alone_has_no_sweep(sweep_dir):
    runs = sweep_record.run_dirs(sweep_dir)
    found = report_page.content(runs)
    assert (found["sweep"], found["parts"]["sweep"]) == (None, "")
    assert sweep_chart.read([sweep_dir, sweep_dir]) is None

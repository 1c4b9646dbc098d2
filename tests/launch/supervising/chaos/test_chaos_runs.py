"""The comparison of two runs, without processes; tests/multiprocess runs the real thing."""

import sys

import pytest

from jaxdist.errors import RunFailedError, UserError
from jaxdist.launch.supervising.chaos import chaos_runs, strikes
from jaxdist.rundir import ledger


def write_ledger(run_dir, *lines):
    run_dir.mkdir()
    (run_dir / ledger.FILE_NAME).write_text("\n".join(["from 0", *lines, ""]))


def test_ledgers_are_held_to_each_other_and_to_the_data(tmp_path):
    write_ledger(tmp_path / "calm", "1 0 0 4", "2 0 4 8")
    write_ledger(tmp_path / "same", "1 0 0 4", "2 0 4 6", "from 1", "2 0 4 8")
    write_ledger(tmp_path / "lost", "1 0 0 4", "2 0 5 8")
    write_ledger(tmp_path / "other", "1 0 0 5", "2 0 5 8")
    compare = {
        name: chaos_runs.compare_ledgers(tmp_path / "calm", tmp_path / name, num_examples=8)
        for name in ("same", "lost", "other")
    }
    assert compare["same"] == "exact"
    assert "were lost" in compare["lost"]
    assert "not in the steps" in compare["other"]


def make_report(**changes):
    stages = {"detect": 0.25, "restart": 2.0, "restore": 0.5, "compile": 1.25}
    hit = strikes.Hit(strikes.Strike("kill", 0, 3), 4.0, stages)
    values = {
        "planned": 1,
        "hits": [hit],
        "restarts": 1,
        "undisturbed": ("a", 9),
        "disturbed": ("a", 9),
        "ledger": "exact",
    }
    return chaos_runs.ChaosResult(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"disturbed": ("b", 9)},
        {"disturbed": ("a", 8)},
        {"ledger": "lost"},
        {"undisturbed": (None, 9), "disturbed": (None, 9)},
    ],
)
def test_one_difference_is_enough(changes):
    assert make_report().identical
    assert str(make_report()).splitlines()[-1] == "identical"
    assert not make_report(**changes).identical
    assert str(make_report(**changes)).splitlines()[-1] == "NOT identical"


def test_the_report_says_what_was_done_and_what_it_cost():
    content = make_report().to_json()
    assert content["strikes"] == {"kill": 1, "stop": 0, "starve": 0}
    assert content["lost_seconds"] == {"p50": 4.0, "max": 4.0}
    assert content["split_seconds"]["restart"] == {"p50": 2.0, "max": 2.0}
    assert "of these    p50 detect 0.2, restart 2.0, restore 0.5, compile 1.2" in str(make_report())
    assert (content["planned"], content["made"]) == (1, 1)
    assert "1 kills, 0 stops, 0 starved of disk (with joins and leaves 1 of 1 planned)" in str(make_report())


def test_strikes_that_did_not_come_are_not_counted_as_survived():
    report = make_report(planned=8, num_changes=2)
    assert report.proves
    assert "(with joins and leaves 3 of 8 planned)" in str(report)
    assert str(report).splitlines()[-1].startswith("identical after 3 of 8 strikes; the run ended before the others")


def test_runs_that_nothing_happened_to_prove_nothing():
    untouched = make_report(hits=[], restarts=0)
    assert untouched.identical
    assert not untouched.proves
    assert untouched.to_json()["lost_seconds"] == {"p50": None, "max": None}
    assert "seconds" not in str(untouched)
    assert str(untouched).splitlines()[-1].startswith("nothing was struck before the run ended")
    joined = make_report(hits=[], restarts=0, changes=[{"kind": "join", "processes": 3, "seconds_lost": None}])
    assert joined.proves
    assert "changes     1 x join" in str(joined)


def test_the_report_says_whether_the_watchdog_named_the_stopped_process():
    stop = strikes.Strike("stop", 1, 3)
    verdicts = (((1,), 4.0), ((0, 1), 6.0), ((0,), 5.0), None)
    hits = [strikes.Hit(stop, 7.0, verdict=verdict, struck=1) for verdict in verdicts]
    content = make_report(hits=[*hits, strikes.Hit(strikes.Strike("kill", 0, 5), 7.0)], planned=5).to_json()
    assert content["verdicts"] == {"right": 1, "of": 4}
    assert content["verdict_seconds"] == {"p50": 5.0, "max": 6.0}


def test_the_report_of_a_job_without_stages_names_who_was_struck():
    hits = [
        strikes.Hit(strikes.Strike("kill", 0, 3), 1.0, struck=name) for name in ("worker/1", "scheduler", "worker/1")
    ]
    report = make_report(hits=hits)
    assert report.to_json()["struck"] == {"scheduler": 1, "worker/1": 2}
    assert "struck      scheduler x 1, worker/1 x 2" in str(report)
    assert "verdicts" not in str(report)


COUNTS = {"kills": 0, "stops": 0, "starves": 0, "joins": 0, "leaves": 0}


@pytest.mark.parametrize(("status", "error"), [(2, UserError), (1, RunFailedError)])
def test_a_run_that_is_refused_or_fails_says_what_the_run_said(tmp_path, status, error):
    command = [sys.executable, "-c", f"import sys; print('jaxdist: Set it right.'); sys.exit({status})"]
    with pytest.raises(error, match=r"(^|\n)(jaxdist: )?Set it right\.$"):
        chaos_runs.run(command, tmp_path, seed=0, num_processes=2, num_examples=8, counts=COUNTS)
    assert (tmp_path / "undisturbed").exists() == (status == 1)


def test_runs_that_exist_are_left_alone(tmp_path):
    (tmp_path / "disturbed").mkdir()
    with pytest.raises(UserError, match=r"disturbed exists\. Choose another --directory"):
        chaos_runs.run(["false"], tmp_path, seed=0, num_processes=2, num_examples=8, counts=COUNTS)
    assert [path.name for path in tmp_path.iterdir()] == ["disturbed"]

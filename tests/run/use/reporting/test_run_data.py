"""What the report reads from a run directory."""

import json

import pytest
from reported_runs import KILLED, write_run

from jaxdist import errors
from jaxdist.run.use.reporting import run_data


@pytest.mark.parametrize(
    ("command", "repeated"),
    [
        ("jaxdist train x.py --run-dir runs/a --resume --set a=1", "jaxdist train x.py --set a=1"),
        ("jaxdist train 'my x.py' --run-dir=runs/a --overwrite --checkpoint 3", "jaxdist train 'my x.py'"),
        ("", ""),
    ],
)
def test_the_command_that_repeats_a_run_starts_it_in_a_new_directory(command, repeated):
    assert run_data.repeating(command) == repeated


def test_attempts_say_who_failed_and_how_on_every_host(tmp_path):
    run_dir = write_run(tmp_path / "a", events=KILLED)
    (run_dir / "host-1").mkdir()
    (run_dir / "host-1" / "restarts.jsonl").write_text(json.dumps(KILLED[0] | {"time": 102.0}) + "\n")
    assert run_data.attempts(run_dir) == [
        run_data.AttemptEvent("", 0, 0.0, 30.0, "process 1 killed by SIGKILL", 2),
        run_data.AttemptEvent("", 1, 31.0, 9.0, "ended well", 3),
        run_data.AttemptEvent("host-1", 0, 2.0, None, "no end recorded", None),
    ]


def test_a_clock_that_is_set_while_a_job_runs_moves_no_attempt(tmp_path):
    events = [event | {"time": event["time"] + hours * 3600} for event, hours in zip(KILLED, (0, 3, -6, -6))]
    again = {"event": "start", "time": 500.0, "monotonic": 7.0, "process_ids": [7], "attempt": 0}
    ended = {"event": "end", "time": 501.0, "monotonic": 8.0, "attempt": 0, "status": 0, "failed": None, "saved": 9}
    assert run_data.attempts(write_run(tmp_path / "a", events=[*events, again, ended])) == [
        run_data.AttemptEvent("", 0, 0.0, 30.0, "process 1 killed by SIGKILL", 2),
        run_data.AttemptEvent("", 1, 31.0, 9.0, "ended well", 3),
        run_data.AttemptEvent("", 0, 400.0, 1.0, "ended well", 9),  # after the machine was started again
    ]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = run_data.read([write_run(tmp_path / "x" / "a"), write_run(tmp_path / "y" / "a"), write_run(tmp_path / "b")])
    assert [run.name for run in runs] == [str(tmp_path / "x" / "a"), str(tmp_path / "y" / "a"), "b"]


def test_a_run_has_its_curves_confusion_matrices_and_classes(tmp_path):
    config = {"data": {"eval": {"class": "Folder", "vocabulary": {"label": ["cat", "dog"]}}}}
    (run,) = run_data.read([write_run(tmp_path / "a", config=config)])
    assert list(run.curves) == ["train/loss", "train/grad_norm", "eval/loss", "eval/accuracy", "examples_per_second"]
    assert run.to_json()["curves"]["train/loss"]["values"] == [1.0, 0.5, 0.333333]
    assert (run.confusion, run.classes) == ({"eval": [[5.0, 0.0], [2.0, 0.0]]}, ["cat", "dog"])
    assert run.ended == "max_steps"


def test_a_run_that_was_interrupted_is_not_called_running(tmp_path):
    (run,) = run_data.read([write_run(tmp_path / "a", end_reason=None)])
    assert run.ended == "interrupted"


def test_a_long_run_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(run_data, "MOST_POINTS", 200)
    (run,) = run_data.read([write_run(tmp_path / "a", rows=500)])
    loss = run.curves["train/loss"]
    assert (len(loss.values) < 30, loss.rows, loss.steps[0], loss.steps[-1]) == (True, 500, 1, 500)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"has no run\.json"):
        run_data.read([tmp_path])

"""The work of `jaxdist train`: how it starts, its exit status, and the arguments of a job's processes."""

import json
import types

import pytest
import run_records
import tiny_experiment

from jaxdist.cli import parser, train_work
from jaxdist.errors import UserError
from jaxdist.run import supervised

TINY = tiny_experiment.__file__


def parse(*arguments):
    options = parser.make_parser().parse_args(["train", TINY, *map(str, arguments)])
    options.arguments = ["train", TINY, *map(str, arguments)]
    return options


@pytest.mark.parametrize(
    ("end_reason", "status"),
    [
        *[(reason, 0) for reason in ("target_reached", "max_steps", "max_epochs", "max_seconds", "patience")],
        *[(reason, 75) for reason in ("preempted", "hang")],
        *[(reason, 1) for reason in ("nonfinite", "error", None)],
    ],
)
def test_the_exit_status_says_how_a_run_ended(end_reason, status):
    class Made:
        pass

    Made.end_reason = end_reason
    assert train_work.exit_status(Made) == status


@pytest.mark.parametrize("as_json", [False, True])
def test_the_record_is_printed_where_it_is_asked_for(as_json, capsys, tmp_path):
    made = types.SimpleNamespace(end_reason="max_steps", to_json=lambda: {"step": 3})
    assert train_work.report(made, tmp_path, as_json=as_json) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"step": 3, "run_dir": str(tmp_path)} if as_json else shown == ""


@pytest.mark.parametrize("spelling", [["--checkpoint", "5"], ["--checkpoint=5"]])
def test_the_processes_of_a_job_are_not_told_the_checkpoint_that_it_starts_from(spelling, tmp_path, monkeypatch):
    """They continue from the newest step, also after a restart; the supervisor goes back once."""
    told = {}

    def supervise(experiment, arguments, **settings):
        told.update(arguments=arguments, **settings)
        return 0

    monkeypatch.setattr(supervised, "supervise", supervise)
    options = parse("--processes", 2, "--run-dir", tmp_path / "run", "--resume", *spelling, "--max-steps", 9)
    assert train_work.supervise(options, forks=None) == 0
    assert told["checkpoint"] == 5
    assert told["num_processes"] == 2
    run_dir = str(tmp_path / "run")
    assert told["arguments"][:2] == ["train", TINY]
    assert told["arguments"][2:] == [
        "--processes", "2", "--run-dir", run_dir, "--resume", "--max-steps", "9", "--run-dir", run_dir,
    ]  # fmt: skip


@pytest.mark.parametrize("others", [[], ["--resume", "--restartable"], ["--resume", "--strategy", "parameter-server"]])
def test_a_checkpoint_is_named_for_one_continuation_of_a_run(others):
    with pytest.raises(UserError, match="--checkpoint names the step"):
        train_work.supervise(parse("--processes", 2, "--checkpoint", 5, *others), forks=None)


def test_a_process_of_a_job_starts_no_job(monkeypatch):
    monkeypatch.setattr(train_work.places, "find", lambda: "process 1 of 2")
    with pytest.raises(UserError, match=r"this process belongs to one: process 1 of 2\. Leave it out\."):
        train_work.supervise(parse("--processes", 2), forks=None)


def test_a_job_whose_weights_are_not_there_starts_no_process(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(supervised, "supervise", lambda *_, **__: started.append(True) or 0)
    given = ("--processes", 2, "--run-dir", tmp_path / "run", "--set", "init_from=gpt2")
    with pytest.raises(UserError, match="Nothing is downloaded"):
        train_work.supervise(parse(*given), forks=None)
    assert not started
    assert train_work.supervise(parse(*given, "--resume"), forks=None) == 0  # it does not load them again


def beginning(run_dir, *flags):
    options = parser.make_parser().parse_args(["train", "x.py", "--run-dir", str(run_dir), *flags])
    return train_work._beginning(options, run_dir)


def write_run(run_dir, started):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(run_records.EMPTY | {"started": started}))


def test_an_attempt_after_the_replacing_one_resumes(tmp_path):
    """A restart must replace the earlier run if that was not done yet, and must not replace the run it belongs to."""
    run_dir, started = tmp_path / "run", "2026-11-28T12:00:00+00:00"
    write_run(run_dir, started)
    assert beginning(run_dir, "--replace", started) == "overwrite"
    assert beginning(run_dir, "--replace", started, "--resume") == "overwrite"
    write_run(run_dir, "2026-11-28T12:00:07+00:00")
    assert beginning(run_dir, "--replace", started) == "resume"


def test_how_a_run_begins(tmp_path):
    run_dir = tmp_path / "run"
    assert [beginning(run_dir, flag) for flag in ("--restartable", "--overwrite", "--resume")] == [
        "start",
        "overwrite",
        "resume",
    ]
    started = "2026-11-28T12:00:00+00:00"
    assert beginning(run_dir, "--replace", started) == "start"  # removed, and the new one not recorded yet
    write_run(run_dir, started)
    assert [beginning(run_dir), beginning(run_dir, "--restartable")] == ["start", "resume"]


def test_the_processes_of_a_job_are_not_told_what_is_done_once():
    given = ["train", "x.py", "--overwrite", "--checkpoint", "4", "--checkpoint=5", "--devices", "2"]
    assert train_work._for_processes(given) == ["train", "x.py", "--devices", "2"]

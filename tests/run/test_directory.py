import contextlib
import dataclasses
import datetime
import os
import pathlib
import re
import types

import pytest
import run_records
import tiny_experiment

from jaxdist import data, errors
from jaxdist.cli.commands import join_command
from jaxdist.config import overrides
from jaxdist.data import fingerprints
from jaxdist.launch.joining import same_on_all
from jaxdist.run import components, directory
from jaxdist.rundir import lock, record


def test_the_default_run_dir_is_the_newest_when_resuming(tmp_path):
    assert re.fullmatch(r"tiny-\d{8}-\d{6}-\d{6}", directory.default_run_dir("tiny", resume=False, root=tmp_path).name)
    with pytest.raises(errors.UserError, match="no run of tiny to resume"):
        directory.default_run_dir("tiny", resume=True, root=tmp_path)
    for name in ("tiny-20260101-000000", "tiny-20270101-000000", "tiny-other-20280101-000000"):
        (tmp_path / name).mkdir()
    assert directory.default_run_dir("tiny", resume=True, root=tmp_path).name == "tiny-20270101-000000"


def test_two_runs_of_one_second_have_names_of_their_own_in_the_order_of_their_start(tmp_path):
    times = [datetime.datetime(2026, 11, 28, 12, 0, 0, microseconds) for microseconds in (7, 90, 1000)]
    names = [directory.default_run_dir("tiny", resume=False, root=tmp_path, now=lambda t=t: t).name for t in times]
    assert sorted(set(names)) == names


@pytest.mark.parametrize(("recorded", "step", "told"), [(6, 4, True), (6, 6, False), (6, 9, False), (None, 4, False)])
def test_a_newer_checkpoint_that_is_gone_is_named(tmp_path, capsys, recorded, step, told):
    earlier = types.SimpleNamespace(extra={"checkpoint": recorded})
    directory.tell_what_is_gone(earlier, tmp_path, step)
    said = f"names a checkpoint of step {recorded}, which is gone; training continues from step {step}."
    assert (said in capsys.readouterr().err) == told


NAMES = ("checkpoints", "metrics.jsonl", "run.json")


def make_run(run_dir, name, *, step):
    (run_dir / "checkpoints").mkdir(parents=True)
    if step is not None:
        (run_dir / "checkpoints" / str(step)).mkdir()
    for file in NAMES[1:]:
        (run_dir / file).write_text(name)
    (run_dir / "notes.txt").write_text("mine")


def has_run(folder, name, *, step):
    checkpoints = folder / "checkpoints"
    kept = all((folder / file).exists() and (folder / file).read_text() == name for file in NAMES[1:])
    return kept and checkpoints.exists() and [path.name for path in checkpoints.iterdir()] == [str(step)]


@pytest.mark.parametrize("moves", range(4))
def test_a_process_that_is_killed_while_it_replaces_a_run_leaves_the_old_one(tmp_path, monkeypatch, moves):
    """Whatever it has moved until then, the next attempt moves the rest, and the old run goes with a new checkpoint."""
    make_run(tmp_path, "old", step=7)
    rename, left = pathlib.Path.rename, [moves]

    def killed_after_some(path, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "rename", killed_after_some)
        try:
            directory.set_run_aside(tmp_path, of_job=False)
        except KeyboardInterrupt:
            assert (tmp_path / "run.json").read_text() == "old"
    if (tmp_path / "run.json").exists():
        directory.set_run_aside(tmp_path, of_job=False)
    aside = tmp_path / directory.REPLACED_NAME
    assert has_run(aside, "old", step=7)
    # The new run is killed before its first checkpoint, and replaced in its turn.
    make_run(tmp_path, "new", step=None)
    directory.set_run_aside(tmp_path, of_job=False)
    assert has_run(aside, "old", step=7)
    assert not any((tmp_path / name).exists() for name in NAMES)
    # One that has saved a checkpoint takes the place of the old one.
    make_run(tmp_path, "newer", step=9)
    directory.set_run_aside(tmp_path, of_job=False)
    assert has_run(aside, "newer", step=9)
    directory.forget_replaced(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("was_there", [False, True])
def test_a_run_that_begins_on_a_full_disk_is_refused_and_leaves_no_directory(tmp_path, monkeypatch, was_there):
    run_dir = tmp_path / "run"
    if was_there:
        run_dir.mkdir()
    monkeypatch.setattr(directory.full_disk, "has_no_room", lambda path: True)
    directory._check_writable(tmp_path, needs_room=False)
    with pytest.raises(errors.ConfigError, match=rf"needs room on its disk; that of {run_dir} is full\. Free space"):
        directory._check_writable(run_dir, needs_room=True)
    assert run_dir.exists() is was_there


def experiment_on(table, **settings):
    source = data.csv_source(table, categories=())
    tiny = tiny_experiment.get_config()
    return dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, train=source, **settings))


def test_a_resume_says_where_only_the_times_of_the_files_have_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = tmp_path / "t.csv"
    table.write_text("image,label\n1,0\n2,1\n")
    experiment = experiment_on(table)
    identity = components.identity(experiment)
    extra = {"identity": identity.to_json(), "data_files": fingerprints.times_of(experiment.data.train)}
    run_dir = tmp_path / "run"

    def resume(experiment, identity):
        directory.tell_of_times(experiment, directory.prepare_run_dir(experiment, identity, run_dir, resume=True))

    run_dir.mkdir()
    (run_dir / "run.json").write_text("{}")
    monkeypatch.setattr(directory.record.RunRecord, "read", lambda path: types.SimpleNamespace(extra=extra, config={}))
    resume(experiment, identity)
    assert capsys.readouterr().err == ""
    os.utime(table, (1, 1))
    again = experiment_on(table)
    assert components.identity(again) == identity
    resume(again, identity)
    assert "times of the files of data.train have changed" in capsys.readouterr().err
    strict = experiment_on(table, strict=True)
    with pytest.raises(errors.UserError, match=r"data\.train was compared by samples only"):
        directory.prepare_run_dir(strict, components.identity(strict), run_dir, resume=True)
    extra["identity"] = components.identity(strict).to_json()
    resume(strict, components.identity(experiment_on(table, strict=True)))
    assert capsys.readouterr().err == ""  # contents were compared
    table.write_text("image,label\n1,0\n2,0\n")
    changed = experiment_on(table, strict=True)
    with pytest.raises(errors.UserError, match="holds other examples"):
        directory.prepare_run_dir(changed, components.identity(changed), run_dir, resume=True)
    with pytest.raises(errors.UserError, match="by all of its contents, with --strict"):
        directory.prepare_run_dir(again, identity, run_dir, resume=True)


@pytest.mark.parametrize("before", [None, {"logs", "notes.txt"}])
def test_a_job_that_was_refused_leaves_nothing_of_its_own(tmp_path, before):
    run_dir = tmp_path / "run"
    for name in ("logs/attempt-0/process-0.log", "restarts.jsonl", "lock", *(["notes.txt"] if before else [])):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).touch()
    directory.forget_refused(run_dir, before)
    assert {path.name for path in run_dir.iterdir()} == before if before else not run_dir.exists()


def test_a_job_that_was_refused_keeps_a_run(tmp_path):
    for name in ("run.json", "lock"):
        (tmp_path / name).touch()
    directory.forget_refused(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "run.json"]


def test_a_job_that_has_begun_where_another_was_refused_keeps_its_files(tmp_path):
    run_dir = tmp_path / "run"
    with lock.locked(run_dir, purpose="the next job"):
        (run_dir / "logs").mkdir()
        directory.forget_refused(run_dir, None)
        assert sorted(path.name for path in run_dir.iterdir()) == ["lock", "logs"]
        with pytest.raises(lock.LockedError, match="the next job"):
            lock.check_free(run_dir)
    directory.forget_refused(run_dir, None)
    directory.forget_refused(run_dir, None)  # another refused job was faster
    assert not run_dir.exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", [*directory._FOLDERS, *directory._FILES])
def test_something_else_that_has_the_name_of_a_file_or_folder_of_a_run_is_named(tmp_path, name, kind):
    """It would end the run later: at its first row, at its end, or with an error number alone."""
    path = tmp_path / name
    if kind == "file":
        path.touch()
    else:
        path.mkdir()
    if (kind == "folder") == (name in directory._FOLDERS):
        directory.check_names(tmp_path)
        return
    with pytest.raises(errors.ConfigError, match=rf"belongs to its run; {re.escape(str(path))} is a {kind}\. Move it"):
        directory.prepare_run_dir(None, None, tmp_path, resume=False)
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_the_names_of_a_run_directory_that_are_checked_are_those_that_runs_write():
    """A file that is new to run directories is missing from the check until it is named there."""
    assert {*directory._RUN_FILES, *directory._MORE_RUN_FILES, *directory._JOB_FILES} <= {
        *directory._FOLDERS,
        *directory._FILES,
    }


def test_a_pipe_that_has_the_name_of_a_file_of_a_run_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(errors.ConfigError, match="is neither a file nor a folder"):
        directory.prepare_run_dir(None, None, tmp_path, resume=False)


def test_a_run_that_begins_and_ends_while_another_command_starts_is_not_taken_for_none(tmp_path):
    """Two commands at one moment: the second finds no run, and has the lock only when the first has ended."""
    experiment = tiny_experiment.get_config()
    identity = components.identity(experiment)
    run_dir, calls = tmp_path / "run", []

    def prepare():
        found = directory.prepare_run_dir(experiment, identity, run_dir, resume=False)
        calls.append(found)
        record.RunRecord(**run_records.EMPTY, extra={"identity": identity.to_json()}).write(run_dir)  # by the first
        return found

    with contextlib.ExitStack() as stack, pytest.raises(errors.ConfigError, match="already holds a run"):
        directory.take_run_dir(run_dir, prepare, stack, purpose="the second")
    assert calls == [None]
    assert not lock.is_locked(run_dir)


def test_a_resume_reads_the_record_that_the_run_before_it_leaves_at_its_end(tmp_path):
    experiment = tiny_experiment.get_config()
    identity = components.identity(experiment)
    made = record.RunRecord(**run_records.EMPTY, extra={"identity": identity.to_json()})
    made.write(tmp_path)

    def prepare():
        found = directory.prepare_run_dir(experiment, identity, tmp_path, resume=True)
        dataclasses.replace(made, step=9).write(tmp_path)
        return found

    with contextlib.ExitStack() as stack:
        assert directory.take_run_dir(tmp_path, prepare, stack, purpose="resume").step == 9


def test_who_works_in_a_directory_is_said_before_anything_else_of_it(tmp_path):
    """What a running job will leave is not there yet: whether that can be resumed is another question."""

    def prepare():
        raise AssertionError("the lock comes first")

    with (
        lock.locked(tmp_path, purpose="a job"),
        contextlib.ExitStack() as stack,
        pytest.raises(lock.LockedError, match=r"\(a job\) does"),
    ):
        directory.take_run_dir(tmp_path, prepare, stack, purpose="another")


@pytest.mark.parametrize("step", [3, 9])
def test_what_a_parameter_server_has_saved_is_not_taken_for_the_newest_state_of_a_run_that_went_on_without(
    tmp_path, capsys, step
):
    folder = tmp_path / directory.SERVERS_NAME
    for name in ("0000000004-a", "0000000009-b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest").touch()
    (folder / directory.SERVERS_SPEC_NAME).touch()
    (folder / "history").mkdir()
    for _ in range(2):  # a second attempt finds nothing
        directory.leave_servers(tmp_path, step)
    assert [path.name for path in folder.iterdir()] == ["history"]
    aside = tmp_path / directory.SET_ASIDE_NAME / directory.SERVERS_NAME
    assert sorted(path.name for path in aside.iterdir()) == ["0000000004-a", "0000000009-b"]
    said = capsys.readouterr().err
    assert ("has saved a cut of step 9" in said) == (step == 3)
    assert not join_command._is_served(tmp_path)


def test_a_run_that_no_parameter_server_has_trained_is_left_alone(tmp_path):
    directory.leave_servers(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_resume_says_what_of_the_experiment_has_changed(tmp_path, capsys):
    """A loss that computes something else, or another rate, leaves the state its form: it would continue silently."""
    file = tmp_path / "experiment.py"
    file.write_text("WEIGHT = 1\n")
    experiment = tiny_experiment.get_config()
    made = record.RunRecord(
        **run_records.EMPTY | {"config": record.plain(experiment)},
        extra={"experiment": {"hashes": same_on_all.files_of(file)}},
    )
    directory.tell_of_edits(experiment, None, {})
    directory.tell_of_edits(experiment, made, same_on_all.files_of(file))
    directory.tell_of_edits(experiment, made, {})
    assert capsys.readouterr().err == ""
    file.write_text("WEIGHT = 2\n")
    faster = overrides.override(experiment, ["optimizer.learning_rate=0.5", "stop.max_steps=9"])
    directory.tell_of_edits(faster, made, same_on_all.files_of(file))
    told = "this was changed: optimizer.learning_rate 0.1 -> 0.5; the file experiment.py. It continues so."
    assert told in capsys.readouterr().err

"""Run directories that an attempt must not write to, and what --overwrite replaces."""

import dataclasses
import json
import pathlib
import shutil

import pytest
import tiny_experiment
from tiny_runs import run

from jaxdist import errors
from jaxdist.launch.supervising import supervisor

pytestmark = pytest.mark.usefixtures("shared_compilations")


def contents(folder):
    """Return the files below a folder with their bytes, but not the signs of life that a process gives at its start."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != supervisor.BOARD_NAME)
    return {path: path.read_bytes() for path in files}


def refused(match, run_dir, *assignments, **options):
    with pytest.raises(errors.UserError, match=match):
        run(run_dir, *assignments, **options)


def test_a_directory_that_holds_a_run_is_not_written_to(undisturbed):
    before = contents(undisturbed)
    refused(r"already holds a run\. Continue it with --resume", undisturbed)
    refused(r"another experiment: name tiny -> other\. To resume", undisturbed, "name=other")
    refused(r"another experiment: model\.width 8 -> 9\. To resume", undisturbed, "model.width=9", resume=True)
    refused(r"another experiment: seed 0 -> 1\. To resume", undisturbed, "seed=1", resume=True)
    refused(r"this was changed: optimizer\.name momentum -> adam\.$", undisturbed, "optimizer.name=adam", resume=True)
    shorter = other_data(tiny_experiment.make_source(51, 0))
    refused(r"experiment: data\.train 52 examples -> 51 examples\. To", undisturbed, experiment=shorter, resume=True)
    others = other_data(tiny_experiment.make_source(52, 9))
    refused(r"holds other examples \(fingerprint [\w:]+ -> [\w:]+\)\. To", undisturbed, experiment=others, resume=True)
    assert contents(undisturbed) == before


def other_data(source):
    experiment = tiny_experiment.get_config()
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, train=source))


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    run_dir = tmp_path / "run"
    before = run(run_dir, "stop.max_steps=4", "recovery.ledger=true")
    (run_dir / "notes.txt").write_text("a user's own file")
    (run_dir / "figures").mkdir()
    refused("Lower global_batch_size", run_dir, "global_batch_size=1000", overwrite=True)
    assert json.loads((run_dir / "run.json").read_text())["step"] == 4
    after = run(run_dir, "stop.max_steps=2", "seed=1", overwrite=True)
    assert (after.step, after.restarts) == (2, 0)
    assert after.params_sha256 != before.params_sha256
    assert [int(path.name) for path in (run_dir / "checkpoints").iterdir()] == [2]
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert not (run_dir / "ledger.txt").exists()
    assert (run_dir / "notes.txt").read_text() == "a user's own file"
    assert (run_dir / "figures").is_dir()


def test_overwrite_starts_a_run_where_there_is_none_and_leaves_what_is_no_run(tmp_path):
    assert run(tmp_path / "new", "stop.max_steps=1", overwrite=True).step == 1
    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    refused("it is unclear which run", tmp_path / "theirs", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"a user": "wrote this"}')
    refused("is not a jaxdist run record", tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "run.json").read_text() == '{"a user": "wrote this"}'


def test_nothing_to_resume(tmp_path):
    refused("--resume needs a run", tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


def test_a_directory_that_cannot_be_written(tmp_path):
    """The tests may run as root, who may write anywhere but here."""
    (tmp_path / "file").write_text("a file")
    refused("file is a file, or a link to nothing", tmp_path / "file")
    refused("must be writable; .*file/run is not", tmp_path / "file" / "run")
    refused("must be writable", pathlib.Path("/proc/jaxdist"))
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/3/x", "tensorboard/events"])
def test_files_of_a_run_without_its_record_are_not_written_to(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    refused(rf"{name.split('/')[0]}.* but no run\.json", tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    refused(r"run\.json", tmp_path, resume=True)
    assert (tmp_path / "run.json").read_text() == text


def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(tmp_path):
    run(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "10" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 20:
            path.write_bytes(bytes(path.stat().st_size))
    before = contents(tmp_path / "run")
    refused("Step 8 is intact", tmp_path / "run", "stop.max_steps=12", resume=True)
    assert contents(tmp_path / "run") == before


def test_a_resume_in_another_order_is_refused_and_changes_nothing(undisturbed):
    before = contents(undisturbed)
    refused("Restore shuffle, or the order", undisturbed, "stop.max_steps=12", "data.shuffle=False", resume=True)
    assert contents(undisturbed) == before


def test_a_resume_whose_checkpoints_are_gone_is_refused_and_changes_nothing(tmp_path):
    run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("run.json", "metrics.jsonl")}
    with pytest.raises(errors.UserError, match=r"a checkpoint of step 10, and .*checkpoints holds none"):
        run(tmp_path / "run", "stop.max_steps=20", resume=True)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


def test_wrong_settings_create_nothing(tmp_path):
    refused("14 or 16", tmp_path / "run", "global_batch_size=15")
    refused("no strategy 'magic'", tmp_path / "run", "strategy=magic")
    refused(r"stop\.max_steps must be positive", tmp_path / "run", "stop.max_steps=0")
    refused("needs a rule that ends it", tmp_path / "run", "stop.max_steps=None")
    refused("no effect on momentum", tmp_path / "run", "optimizer.beta1=0.5")
    refused("multiple of 6", tmp_path / "run", "reduction=canonical", "logical_shards=6")
    assert not (tmp_path / "run").exists()

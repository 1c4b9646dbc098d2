"""A step of a run is computed again, on another number of devices, and compared with what was recorded."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny_experiment
from trained_tiny import train

from jaxdist import errors
from jaxdist.config import overrides
from jaxdist.run import attempt
from jaxdist.run.replay import comparison, replaying, step_chain
from jaxdist.rundir import record

pytestmark = pytest.mark.usefixtures("shared_compilations")
CANONICAL = ("reduction=canonical", "logical_shards=4", "stop.max_steps=7", "data.eval=None")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Seven steps on two devices, with checkpoints of steps 4 and 7."""
    run_dir = tmp_path_factory.mktemp("replay") / "run"
    train(run_dir, *CANONICAL)
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def replay(run_dir, step, *, num_devices=1, **changes):
    return replaying.replay(run_dir, step, devices=jax.devices()[:num_devices], **changes)


def tamper(run_dir, step, field, place):
    """Change one recorded hash, as a step that was computed wrongly would have."""
    path = run_dir / step_chain.FILE_NAME
    chain = step_chain.read(run_dir)
    entry = chain.entries[step - 1]
    entry[field][place] += 1
    entry["whole"] += 1
    entry["crc"] = step_chain._crc(entry)
    path.write_bytes(chain.form.line() + chain.entries.tobytes())
    return chain.form


@pytest.mark.parametrize(("step", "num_devices", "start"), [(7, 1, 4), (3, 4, 0)])
def test_an_honest_step_is_identical_from_a_checkpoint_and_from_the_start(trained, step, num_devices, start):
    found = replay(trained, step, num_devices=num_devices)
    assert (found.identical, found.start, found.differences) == (True, start, [])
    assert f"Step {step} is identical" in str(found)


def test_a_step_that_was_computed_wrongly_is_found_with_its_shard(run_dir):
    form = tamper(run_dir, 6, "shards", 3)
    tamper(run_dir, 6, "leaves", 0)
    found = replay(run_dir, 6)
    assert found.differences == [step_chain.Difference(6, (3,), (form.names[0],))]
    assert not found.identical
    assert "Step 6 differs" in str(found)
    on_the_way = replay(run_dir, 7)
    assert on_the_way.identical
    assert "The first on the way that differs is step 6" in str(on_the_way)


def test_a_checkpoint_that_is_not_what_was_recorded_is_told(run_dir):
    form = tamper(run_dir, 4, "leaves", -1)
    found = replay(run_dir, 5)
    assert found.differences == [step_chain.Difference(4, (), (form.names[-1],))]
    assert "not what the chain recorded" in str(found)


@pytest.mark.parametrize("step", [0, 8])
def test_a_step_that_is_not_recorded_is_the_users_mistake(trained, step):
    with pytest.raises(errors.UserError, match="holds steps 1 to 7"):
        replay(trained, step)


def test_other_settings_or_other_data_are_refused(trained):
    same = overrides.override(tiny_experiment.get_config(), CANONICAL)
    with pytest.raises(errors.UserError, match=r"optimizer\.learning_rate 0\.1 -> 0\.2"):
        replay(trained, 5, experiment=overrides.override(same, ["optimizer.learning_rate=0.2"]))
    other = dataclasses.replace(same.data, train=tiny_experiment.make_source(tiny_experiment.NUM_TRAIN, seed=5))
    with pytest.raises(errors.UserError, match="reduction canonical -> mean"):
        replay(trained, 5, experiment=dataclasses.replace(same, reduction="mean"))
    with pytest.raises(errors.UserError, match="training data"):
        replay(trained, 5, experiment=dataclasses.replace(same, data=other))


def test_a_resumed_run_continues_its_chain_and_records_a_step_that_came_out_otherwise(run_dir, capsys):
    """Steps 5 to 7 are made again, from step 4; step 6 had been recorded otherwise."""
    tamper(run_dir, 6, "shards", 1)
    made = record.RunRecord.read(run_dir)
    experiment = overrides.override(tiny_experiment.get_config(), CANONICAL)
    options = attempt.RunOptions(run_dir=run_dir, resume=True, checkpoint=4, silent=True)
    again = attempt.train(experiment, options, devices=jax.devices()[:4])
    assert again.params_sha256 == made.params_sha256
    assert [found["step"] for found in again.extra["chain"]["unequal"]] == [6]
    assert "step 6: logical shard 1" in capsys.readouterr().err
    assert replay(run_dir, 6, experiment=experiment).identical  # the newer hashes are kept


@pytest.mark.slow
def test_two_runs_of_one_experiment_are_equal_on_other_devices(trained, tmp_path):
    experiment = overrides.override(tiny_experiment.get_config(), CANONICAL)
    options = attempt.RunOptions(run_dir=tmp_path / "other", silent=True)
    attempt.train(experiment, options, devices=jax.devices()[:1])
    assert comparison.compare(trained, tmp_path / "other").equal
    chains = [step_chain.read(folder).entries for folder in (trained, tmp_path / "other")]
    np.testing.assert_array_equal(*chains)


@pytest.mark.slow
def test_no_chain_is_recorded_where_it_is_switched_off(tmp_path):
    made = train(tmp_path / "run", *CANONICAL, "guards.step_hashes=false", "stop.max_steps=1")
    assert "chain" not in made.extra
    assert step_chain.read(tmp_path / "run") is None

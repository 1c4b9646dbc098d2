import dataclasses

import jax
import pytest
import tiny_experiment

import jaxdist
from jaxdist.config import overrides
from jaxdist.errors import ConfigError
from jaxdist.run import preflight


@pytest.fixture
def experiment():
    return tiny_experiment.get_config()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("global_batch_size=0", "global_batch_size must be at least 1; got 0"),
        ("num_microbatches=0", "num_microbatches must be at least 1"),
        ("log_every=0", "log_every must be at least 1"),
        ("eval.every_steps=0", r"eval\.every_steps must be at least 1"),
        ("eval.every_epochs=-1", r"eval\.every_epochs must be at least 1"),
        ("checkpoints.every_steps=0", r"checkpoints\.every_steps must be at least 1"),
        ("checkpoints.keep_last=0", r"checkpoints\.keep_last must be at least 1"),
        ("checkpoints.keep_every=0", r"checkpoints\.keep_every must be at least 1"),
        ("guards.check_replicas_every=-1", r"guards\.check_replicas_every must be at least 0"),
        ("data.prefetch=0", r"data\.prefetch must be at least 1"),
        ("data.num_threads=-1", r"data\.num_threads must be at least 0"),
        ("recovery.min_processes=0", r"recovery\.min_processes must be at least 1"),
        ("recovery.hang_seconds=0", r"recovery\.hang_seconds must be positive; got 0"),
        ("recovery.slow_seconds=nan", r"recovery\.slow_seconds must be positive; got nan"),
        ("recovery.deadline_seconds=-1", r"recovery\.deadline_seconds must be positive; got -1"),
        ("recovery.patience_seconds=-0.5", r"recovery\.patience_seconds must not be negative; got -0\.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_starts(experiment, assignment, message):
    with pytest.raises(ConfigError, match=message):
        preflight.check_settings(overrides.override(experiment, [assignment]))


def test_a_target_or_patience_on_held_out_data_needs_some(experiment):
    alone = dataclasses.replace(experiment, data=jaxdist.Data(train=experiment.data.train))
    for limits in ({"target": 0.9}, {"patience": 2}):
        with pytest.raises(ConfigError, match=r"eval/accuracy.*no data\.eval"):
            preflight.check_settings(dataclasses.replace(alone, stop=jaxdist.Stop(**limits)))
    preflight.check_settings(dataclasses.replace(alone, stop=jaxdist.Stop(target=0.9, target_metric="train/accuracy")))
    preflight.check_settings(alone)


def test_canonical_steps_are_not_made_without_compiling(experiment):
    canonical = overrides.override(experiment, ["reduction=canonical"])
    with jax.disable_jit():
        preflight.check_settings(experiment)
        with pytest.raises(ConfigError, match="jax_disable_jit compiles none"):
            preflight.check_settings(canonical)

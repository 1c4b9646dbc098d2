"""A trained run of the tiny experiment, for tests of what follows a run."""

import pathlib

import jax
import tiny_experiment

from jaxdist.config import overrides
from jaxdist.run import attempt, bookkeeping

TINY = pathlib.Path(tiny_experiment.__file__)


def train(run_dir, *assignments, file=TINY, experiment=None):
    experiment = experiment or overrides.override(tiny_experiment.get_config(), assignments)
    source = bookkeeping.ExperimentSource(str(file), assignments) if file else None
    options = attempt.RunOptions(run_dir=run_dir, silent=True, source=source)
    return attempt.train(experiment, options, devices=jax.devices()[:2])


def held_out(num_examples=tiny_experiment.NUM_HELD_OUT):
    return tiny_experiment.make_source(num_examples, seed=1).arrays

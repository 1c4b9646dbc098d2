"""Short forms of an experiment, to find mistakes early: a few steps of everything, or one batch again and again."""

import contextlib
import dataclasses
import itertools

import numpy as np

from jaxdist.config import data_fields
from jaxdist.config.experiment import Experiment
from jaxdist.data import ArraySource, Source, Subset
from jaxdist.data.sources.source import MASK
from jaxdist.optimizers import Optimizer, Schedule
from jaxdist.run import components
from jaxdist.stop import Stop

STEPS = 3
ONE_BATCH_STEPS = 200


def few_steps(experiment: Experiment) -> Experiment:
    """Return the experiment with three steps, or as few as its stop rule says, and one evaluation of one batch.

    One checkpoint is saved, and no tracker writes.
    """
    size, steps = experiment.global_batch_size, min(STEPS, experiment.stop.max_steps or STEPS)
    return dataclasses.replace(
        experiment,
        data=dataclasses.replace(experiment.data, eval=_first(experiment.data.eval, size)),
        stop=Stop(max_steps=steps),
        eval=dataclasses.replace(experiment.eval, every_steps=steps),
        checkpoints=dataclasses.replace(experiment.checkpoints, every_steps=steps, best_metric=None),
        writers=("jsonl",),
    )


def one_batch(experiment: Experiment) -> Experiment:
    """Return the experiment with the first batch of its first epoch that is full as its training and held-out examples.

    The batch is that after all transforms, whose random choices are made once: every step sees the same numbers. A
    model that is able to learn, and a loss and an optimizer that are right, drive the loss to about 0. The learning
    rate is constant and no target ends it: an epoch is one step here, so what counts epochs would be over at once.
    """
    batch = ArraySource(_full_batch(experiment))
    data = dataclasses.replace(
        experiment.data,
        train=batch,
        eval=None if experiment.data.eval is None else batch,
        shuffle=False,
        order=None,
        example_fn=None,
        eval_example_fn=None,
        batch_fn=None,
        num_workers=0,
    )
    optimizer = experiment.optimizer
    return dataclasses.replace(
        experiment,
        data=data,
        optimizer=dataclasses.replace(optimizer, schedule=Schedule())
        if isinstance(optimizer, Optimizer)
        else optimizer,
        stop=Stop(max_steps=experiment.stop.max_steps or ONE_BATCH_STEPS),
        eval=dataclasses.replace(experiment.eval, every_steps=ONE_BATCH_STEPS // 4),
        checkpoints=dataclasses.replace(experiment.checkpoints, best_metric=None),
    )


def _full_batch(experiment: Experiment) -> dict[str, np.ndarray]:
    """Return the first batch of the first epoch in which every row counts, without the mask."""
    here = dataclasses.replace(experiment.data, num_workers=0)
    loader = components.make_loader(dataclasses.replace(experiment, data=here), fingerprint="")
    with contextlib.closing(iter(loader)) as batches:
        for host in itertools.islice(batches, loader.steps_per_epoch):
            if host.batch[MASK].all():
                return {name: np.array(values) for name, values in host.batch.items() if name != MASK}
    raise ValueError("--overfit-batch trains on a batch without padding, and no batch of the first epoch is one.")


def _first(sources: Source | dict[str, Source] | None, count: int) -> Source | dict[str, Source] | None:
    """Return the first `count` examples of each set."""
    named = data_fields.named_sources(sources)
    first: dict[str, Source] = {
        name: Subset(source, np.arange(min(count, len(source)))) for name, source in named.items()
    }
    return first if isinstance(sources, dict) else next(iter(first.values()), None)

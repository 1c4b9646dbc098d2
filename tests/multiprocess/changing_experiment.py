"""The held experiment, of as many steps as no test outlasts: its processes change meanwhile."""

import dataclasses

import held_experiment

import jaxdist

STEPS = 1500


def get_config() -> jaxdist.Experiment:
    return dataclasses.replace(
        held_experiment.get_config(),
        name="changing",
        stop=jaxdist.Stop(max_steps=STEPS),
        eval=jaxdist.Evaluation(every_epochs=100),
        checkpoints=jaxdist.Checkpoints(every_steps=100_000),
        recovery=jaxdist.Recovery(ledger=True),
        reduction="canonical",
        log_every=500,
    )

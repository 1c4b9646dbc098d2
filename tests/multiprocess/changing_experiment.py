"""The tiny experiment, slow until the file named by GO appears: a test has time to change the number of processes."""

import dataclasses
import os
import time

import tiny_experiment

import jaxdist

GO = "JAXDIST_TEST_GO"


def take_time(example, random):
    del random
    if not os.path.exists(os.environ.get(GO, "/")):
        time.sleep(0.01)
    return example


def get_config() -> jaxdist.Experiment:
    tiny = tiny_experiment.get_config()
    return dataclasses.replace(
        tiny,
        name="changing",
        data=dataclasses.replace(tiny.data, example_fn=take_time),
        stop=jaxdist.Stop(max_steps=1500),
        eval=jaxdist.Evaluation(every_epochs=100),
        checkpoints=jaxdist.Checkpoints(every_steps=100_000),
        recovery=jaxdist.Recovery(ledger=True),
        reduction="canonical",
        log_every=500,
    )

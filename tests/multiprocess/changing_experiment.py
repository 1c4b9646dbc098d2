"""The tiny experiment, held open until the file named by GO appears: a test changes its processes meanwhile.

Until then every example takes so long that the 1,500 steps last longer than any test may, on five processes too: no
machine is fast enough to end the run before a test has seen what it waits for. Without the variable nothing is held.
"""

import dataclasses
import os
import time

import tiny_experiment

import jaxdist

GO = "JAXDIST_TEST_GO"
STEPS = 1500
HELD_SECONDS = 0.2
"""Of an example: a step of 16 examples takes 3.2 s on one process, 0.6 s on five."""


def take_time(example, random):
    del random
    if not os.path.exists(os.environ.get(GO, "/")):
        time.sleep(HELD_SECONDS)
    return example


def get_config() -> jaxdist.Experiment:
    tiny = tiny_experiment.get_config()
    return dataclasses.replace(
        tiny,
        name="changing",
        data=dataclasses.replace(tiny.data, example_fn=take_time),
        stop=jaxdist.Stop(max_steps=STEPS),
        eval=jaxdist.Evaluation(every_epochs=100),
        checkpoints=jaxdist.Checkpoints(every_steps=100_000),
        recovery=jaxdist.Recovery(ledger=True),
        reduction="canonical",
        log_every=500,
    )

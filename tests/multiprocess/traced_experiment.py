"""The tiny experiment, whose process 0 is killed once, after step 6: its loss notes the processes that trace it."""

import dataclasses
import os
import pathlib
import signal

import tiny_experiment

import jaxdist
from jaxdist import losses

NOTES = "JAXDIST_TEST_TRACED"
"""Environment variable: the file with the numbers of the processes that have traced the loss."""
KILLED_AFTER = 6


def loss(outputs, batch):
    with open(os.environ[NOTES], "a") as notes:
        notes.write(f"{os.getpid()}\n")
    return losses.classification(outputs, batch)


class KilledOnce:
    def on_step(self, info):
        struck = pathlib.Path(os.environ[NOTES]).with_name("struck")
        if info.step == KILLED_AFTER and not struck.exists():
            struck.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def get_config() -> jaxdist.Experiment:
    tiny = tiny_experiment.get_config()
    return dataclasses.replace(
        tiny,
        loss=loss,
        data=dataclasses.replace(tiny.data, eval=None),
        reduction="canonical",
        hooks=(KilledOnce(),),
        stop=jaxdist.Stop(max_steps=12),
    )

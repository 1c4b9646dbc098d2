"""An experiment that does something to itself in a chosen phase: it says so in a file and waits, or fills a disk.

Environment variables: PHASE (one of PHASES), PHASE_DIR (where `reached` appears, and the process waits for `go`), and
PHASE_FILL (a directory: it is filled instead of waiting). The last process of a job does it, once. "between attempts"
ends that process, so that the supervisor pauses: in every attempt, or once if it fills a disk.
"""

import dataclasses
import os
import pathlib
import sys
import time

import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import tiny_experiment

import jaxdist
from jaxdist import adapters
from jaxdist.run import recovery, stopwatch

PHASES = ("start-up", "training", "evaluation", "saving", "restoring", "between attempts")
_STEPS_BEFORE = 6
_SECONDS = 200.0


def get_config():
    last = int(os.environ.get("JAXDIST_NUM_PROCESSES", "1")) - 1
    if os.environ.get("PHASE") and int(os.environ.get("JAXDIST_PROCESS_ID", "-1")) == last:
        _wait_for(os.environ["PHASE"], pathlib.Path(os.environ["PHASE_DIR"]))
    return dataclasses.replace(
        tiny_experiment.get_config(),
        model=adapters.Functions(_init, _loss, _loss),
        loss=None,
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1),
    )


def _init(key):
    """Return the params of a line: little to trace, since that is most of what a case costs."""
    del key
    return {"w": jnp.zeros(tiny_experiment.NUM_FEATURES)}


def _loss(params, batch, key):
    del key
    return jaxdist.masked_mean((batch["image"] @ params["w"] - batch["label"]) ** 2, batch["mask"]), {}


def _wait_for(phase, directory):
    if phase == "start-up":
        _arrive(directory)
    elif phase == "between attempts":
        first = not (directory / "reached").exists()
        if "PHASE_FILL" in os.environ:
            _arrive(directory)
        if first:
            os._exit(9)
    elif phase == "restoring":
        _before(recovery, "restore_newest", lambda *args: True, directory)
    else:
        account = {"training": "compute", "evaluation": "eval", "saving": "checkpoint"}[phase]
        needed = _STEPS_BEFORE if phase == "training" else 1
        seen = []
        _before(
            stopwatch.Stopwatch,
            "enter",
            lambda self, name: name == account and (seen.append(name) or len(seen) >= needed),
            directory,
        )


def _before(owner, name, is_time, directory):
    original = getattr(owner, name)

    def instead(*args):
        if is_time(*args):
            _arrive(directory)
        return original(*args)

    setattr(owner, name, instead)


def _arrive(directory):
    """Say once that the phase is reached, and wait, or fill the disk."""
    try:
        os.close(os.open(directory / "reached", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if "PHASE_FILL" in os.environ:
        _fill(pathlib.Path(os.environ["PHASE_FILL"]))
        return
    end = time.monotonic() + _SECONDS
    while not (directory / "go").exists() and time.monotonic() < end:
        time.sleep(0.01)


def _fill(directory):
    with open(directory / "fill", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue

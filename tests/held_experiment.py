"""The tiny experiment, held open until the file named by GO appears: a test acts on the run meanwhile.

Until then every example takes so long that hundreds of steps last longer than any test may, on five processes too: no
machine is fast enough to end the run before a test has seen what it waits for. With AT, nothing takes long and the run
waits at that step instead, which suits a run of one process that is stopped or killed. Without GO nothing is held.
"""

import dataclasses
import os
import pathlib
import time

import tiny_experiment

import jaxdist

GO, AT = "JAXDIST_TEST_GO", "JAXDIST_TEST_HELD_AT"
HELD_SECONDS = 0.2
"""Of an example: a step of 16 examples takes 3.2 s on one process, 0.6 s on five."""


def written(path, go):
    """Write and return the same experiment as a file that names GO itself.

    It is for processes that SLURM or Ray start, in an environment that is not the test's.
    """
    tests = str(pathlib.Path(__file__).parent)
    path.write_text(
        f"import os, sys\nos.environ[{GO!r}] = {str(go)!r}\nsys.path.insert(0, {tests!r})\n"
        "from held_experiment import get_config as get_config\n"
    )
    return path


def is_held():
    return GO in os.environ and not os.path.exists(os.environ[GO])


def take_time(example, random):
    del random
    if is_held() and AT not in os.environ:
        time.sleep(HELD_SECONDS)
    return example


def wait(info):
    while str(info.step) == os.environ.get(AT) and is_held():
        time.sleep(0.01)


def get_config() -> jaxdist.Experiment:
    tiny = tiny_experiment.get_config()
    data = dataclasses.replace(tiny.data, example_fn=take_time)
    return dataclasses.replace(tiny, name="held", data=data, hooks=(wait,))

"""`jaxdist.train`: a run from a script or a notebook, with the defaults of the command line.

>>> run = jaxdist.train(experiment)  # doctest: +SKIP
>>> run.predict(images)  # doctest: +SKIP
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import jax

from jaxdist import errors
from jaxdist.config.experiment import Experiment
from jaxdist.launch import signals
from jaxdist.run import attempt, directory
from jaxdist.run.use import trained
from jaxdist.rundir.remote import working_copy
from jaxdist.rundir.remote.run_address import Address, place_of_run

_SERVERS = "parameter-server"
_UNNAMED = "run"
_IN_PYTHON = {"--resume": "resume=True", "--overwrite": "overwrite=True", "another --run-dir": "another run_dir"}
"""What is said of options of the command line, and what does the same here."""


def train(
    experiment: Experiment,
    run_dir: str | os.PathLike[str] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    silent: bool = False,
) -> trained.TrainedRun:
    """Train an experiment until its stop rule ends it, and return the trained run: its best checkpoint.

    In the main thread Ctrl-C, and a notebook's stop button, end the run after the present step, with a checkpoint.
    SIGTERM, SIGHUP and SIGUSR1 then end the script too, with status 75, or are left to a handler of its own. A cell
    that is run twice makes two runs; with a `run_dir` of its own, say whether to resume or to overwrite it.

    Args:
      experiment: what to train, under any strategy but `parameter-server`.
      run_dir: a directory, or an address such as `s3://bucket/run`; by default `runs/NAME-TIME`.
      devices: what to train on; all devices by default.
      resume: continue the run in `run_dir`, by default the newest of this name.
      overwrite: replace the run in `run_dir`, if there is one.
      silent: show nothing while training.

    Raises:
      UserError: invalid settings, or a run directory that cannot be used so.
      RunFailedError: the run ended before it saved a checkpoint.
    """
    if experiment.strategy == _SERVERS:
        raise errors.UserError("A parameter server has processes of its own; train it by the command `jaxdist train`.")
    if resume and overwrite:
        raise errors.UserError("resume continues a run and overwrite replaces it; got both. Leave one out.")
    experiment = experiment if experiment.name else dataclasses.replace(experiment, name=_UNNAMED)
    with errors.reworded(_IN_PYTHON):
        place = place_of_run(os.fspath(run_dir or directory.default_run_dir(experiment.name, resume=resume)))
        chosen = list(jax.devices() if devices is None else devices)
        how = working_copy.HowToBegin(resume=resume, overwrite=overwrite)
        with _stopped_by_signal() as stop_requested, _local(place, how) as local:
            made = attempt.train(
                experiment,
                attempt.RunOptions(
                    run_dir=local,
                    resume=resume,
                    overwrite=overwrite,
                    silent=silent,
                    command="jaxdist.train",
                    stop_requested=stop_requested,
                ),
                devices=chosen,
            )
            if made.extra.get("checkpoint") is None:
                raise errors.RunFailedError(
                    f"The run in {local} ended as {made.end_reason} at step {made.step}, before it saved a checkpoint."
                )
            run = trained.load(local, experiment=experiment, devices=chosen)
        return dataclasses.replace(run, run_dir=place)


@contextlib.contextmanager
def _local(place: pathlib.Path | Address, how: working_copy.HowToBegin) -> Iterator[pathlib.Path]:
    if isinstance(place, pathlib.Path):
        yield place
        return
    with working_copy.opened(place, how, purpose="jaxdist.train") as run_dir:
        yield run_dir


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[Callable[[int], bool]]:
    """Yield what tells the loop of a signal; Python handles signals in its main thread alone.

    One that is sent to end a program is passed on when the run is saved: a script may have more runs to start.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    with signals.stop_on_signal() as request:
        yield lambda step: bool(request)
    if request.signal in (None, signal.SIGINT):
        return
    if signal.getsignal(request.signal) == signal.SIG_DFL:
        raise SystemExit(int(errors.ExitStatus.RETRY))
    signal.raise_signal(request.signal)

"""`jaxdist chaos`: a run whose processes are killed at random, compared with an undisturbed one."""

import argparse
import contextlib
import functools
import json
import pathlib
import signal
import sys
import tempfile
from typing import Any

from jaxdist import errors
from jaxdist.cli import parser, selected_experiment
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ExitStatus
from jaxdist.launch.supervising import restart_events
from jaxdist.launch.supervising.chaos import chaos_runs
from jaxdist.launch.supervising.chaos.supervised_job import SupervisedJob
from jaxdist.run.use.reporting import timeline

PICTURE_NAME = "changes.svg"
_KINDS = ("kills", "stops", "starves", "joins", "leaves")


def chaos(options: argparse.Namespace) -> int:
    """Compare an undisturbed run with one whose processes are killed; exit 1 if they differ or nothing was struck."""
    # Like Ctrl-C, so that the running job ends too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    experiment = selected_experiment.load(options)
    if experiment.strategy == parser.PARAMETER_SERVER:
        with errors.as_user_error():
            handler = parser.find_handler("jaxdist.cli.server_work:chaos")
        return handler(options, experiment, compare)
    options.reduction = options.reduction or "canonical"
    processes = options.processes or 2
    made = [*command(options, before=["recovery.hang_seconds=10"]), "--processes", str(processes)]
    make_job = functools.partial(SupervisedJob, hang_seconds=experiment.recovery.hang_seconds)
    return compare(options, experiment, made, num_processes=processes, make_job=make_job)


def compare(options: argparse.Namespace, experiment: Experiment, command: list[str], **job: Any) -> int:
    """Compare two runs of `command`; show the result and return the exit status. `job`: see `chaos_runs.run`."""
    directory = options.directory or pathlib.Path(tempfile.mkdtemp(prefix="jaxdist-chaos-"))
    counts = {kind: getattr(options, kind) for kind in _KINDS}
    num_examples = len(experiment.data.train)
    try:
        report = chaos_runs.run(command, directory, seed=options.seed, num_examples=num_examples, counts=counts, **job)
    except errors.UserError:
        with contextlib.suppress(OSError):  # it holds the runs of others
            directory.rmdir()
        raise
    struck = directory / "disturbed"
    picture = struck / "timeline.svg"
    if not picture.exists():  # a parameter server draws its own
        picture = directory / PICTURE_NAME
        picture.write_text(timeline.draw(restart_events.read_events(struck)))
    shown = f"{report}\nboth runs   {directory}\npicture     {picture}"
    print(json.dumps(report.to_json()) if options.json else shown)
    return ExitStatus.OK if report.proves else ExitStatus.FAILED


def command(options: argparse.Namespace, *, before: list[str]) -> list[str]:
    """Return the command of the runs that chaos compares, with settings that the user's own replace."""
    always = ["recovery.ledger=true", "recovery.max_fruitless=1000000"]
    selection = selected_experiment.as_arguments(options, before=before, after=always)
    return [sys.executable, "-m", "jaxdist.cli", "train", options.experiment, *selection]

"""`jaxdist chaos`: a run whose processes are killed at random, compared with an undisturbed one."""

import argparse
import json
import pathlib
import signal
import sys
import tempfile

from jaxdist.cli import selected_experiment
from jaxdist.errors import ExitStatus
from jaxdist.launch.supervising import chaos as experiment_under_fire
from jaxdist.launch.supervising import restart_events
from jaxdist.run.use.reporting import timeline

PICTURE_NAME = "changes.svg"


def chaos(options: argparse.Namespace) -> int:
    """Compare an undisturbed run with one whose processes are killed; exit 1 when they differ."""
    # Like Ctrl-C, so that the running job ends too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.reduction = options.reduction or "canonical"
    experiment = selected_experiment.load(options)
    directory = options.directory or pathlib.Path(tempfile.mkdtemp(prefix="jaxdist-chaos-"))
    report = experiment_under_fire.run(
        command(options),
        directory,
        seed=options.seed,
        num_processes=options.processes,
        num_examples=len(experiment.data.train),
        kills=options.kills,
        stops=options.stops,
        starves=options.starves,
        joins=options.joins,
        leaves=options.leaves,
    )
    picture = directory / PICTURE_NAME
    picture.write_text(timeline.draw(restart_events.read_events(directory / "disturbed")))
    shown = f"{report}\nboth runs   {directory}\npicture     {picture}"
    print(json.dumps(report.to_json()) if options.json else shown)
    return ExitStatus.OK if report.identical else ExitStatus.FAILED


def command(options: argparse.Namespace) -> list[str]:
    """Return the command of the runs that chaos compares."""
    selection = selected_experiment.as_arguments(
        options,
        before=["recovery.hang_seconds=10"],
        after=["recovery.ledger=true", "recovery.max_fruitless=1000000"],
    )
    processes = ["--processes", str(options.processes)]
    return [sys.executable, "-m", "jaxdist.cli", "train", options.experiment, *processes, *selection]

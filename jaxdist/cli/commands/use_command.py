"""`jaxdist runs`, `report`, `eval`, `predict` and `export`: commands on runs."""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence

from jaxdist.config import data_fields
from jaxdist.data.sources.source import MASK
from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch.joining import runtime
from jaxdist.run.use import exports, predictions, run_list, trained
from jaxdist.run.use.reporting import live_page, report_page
from jaxdist.rundir import confusion
from jaxdist.rundir.remote import fetching
from jaxdist.rundir.remote.run_address import RunPlace
from jaxdist.rundir.writers import format_metrics

COMPARE = "compare"
_UNBOUNDED = 1000
"""Columns of a table that goes to a file or a pipe."""


def runs(options: argparse.Namespace) -> int:
    """List the runs of a folder, or compare those that are named."""
    if options.paths[:1] == [COMPARE]:
        with fetching.all_fetched(options.paths[1:]) as run_dirs:
            found = run_list.compare(run_dirs)
            print(json.dumps(found) if options.json else run_list.show_comparison(run_dirs, found, width=_columns()))
        return ExitStatus.OK
    for folder in options.paths or ["runs"]:
        with fetching.folder_fetched(folder) as local:
            entries = run_list.find(local)
        shown = [dataclasses.asdict(entry) for entry in entries]
        print(json.dumps(shown) if options.json else run_list.show(entries, width=_columns()))
    return ExitStatus.OK


def _columns() -> int:
    return shutil.get_terminal_size((_UNBOUNDED, 0)).columns


def evaluate(options: argparse.Namespace) -> int:
    """Print the metrics of a trained model on a data set."""
    run = _load(options)
    settings = run.experiment.data
    sets = {name: source for name, source in data_fields.named_sources(settings.eval).items() if name}
    named = {**sets, "eval": settings.eval, "train": settings.train}
    if options.data in named:
        found = run.evaluate(named[options.data])
    else:
        if not options.data.startswith("tfds:") and not pathlib.Path(options.data).exists():
            raise UserError(
                f"--data is {', '.join(named)}, a file or folder, or tfds:NAME:SPLIT; there is no {options.data}."
            )
        columns = _columns_read(run, list(run.fields))
        found = run.evaluate(predictions.read_inputs(options.data, like=settings.train, columns=columns))
    if options.json:
        print(json.dumps({"run_dir": str(run.run_dir), "step": run.step, "data": options.data, "metrics": found}))
    else:
        line = f"step {run.step}, {options.data}: {format_metrics(found)}"
        print("\n".join(filter(None, (line, confusion.format_tables(found)))))
    return ExitStatus.OK


def _columns_read(run: trained.TrainedRun, fields: Sequence[str]) -> list[str] | None:
    """Return the fields that a file needs for these of a batch; None where an `example_fn` makes them, of whatever."""
    return None if run.experiment.data.eval_example_fn is not None else [each for each in fields if each != MASK]


def predict(options: argparse.Namespace) -> int:
    """Write a row of a trained model's outputs for each example of a file."""
    predictions.check_output(options.out)
    run = _load(options)
    inputs = run.experiment.inputs
    fields = [inputs] if isinstance(inputs, str) else list(inputs)
    read = predictions.read_inputs if "label" in fields else predictions.read_unlabelled
    source = read(options.input, like=run.experiment.data.train, columns=_columns_read(run, fields))
    predictions.write(options.out, run.predict(source), predictions.files_of(source))
    print(f"{options.out}: the outputs of step {run.step}")
    return ExitStatus.OK


def export(options: argparse.Namespace) -> int:
    """Write a trained model in a format that others read."""
    exports.check_output(options.out, options.format, names=options.names)
    run = _load(options)
    exports.export(run, options.out, options.format, names=options.names)
    print(f"{options.out}: the model of step {run.step} as {options.format}")
    return ExitStatus.OK


def report(options: argparse.Namespace) -> int:
    """Write the report on some runs as one page; with --live, serve it until Ctrl-C."""
    if options.live:
        _check_local(options.run_dirs)
        with contextlib.suppress(KeyboardInterrupt), live_page.serve(options.run_dirs, options.port) as server:
            print(f"http://{live_page.HOST}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        return ExitStatus.OK
    first = options.run_dirs[0]
    alone = len(options.run_dirs) == 1 and isinstance(first, pathlib.Path)
    out = options.out or (first if alone else pathlib.Path()) / report_page.FILE_NAME
    with fetching.all_fetched(options.run_dirs) as run_dirs:
        size = report_page.write(run_dirs, out)
    print(f"{out}: the report, {size / 1e6:.1f} MB")
    return ExitStatus.OK


def _check_local(run_dirs: Sequence[RunPlace]) -> None:
    for place in run_dirs:
        if not isinstance(place, pathlib.Path):
            raise UserError(f"--live follows run directories on this machine; {place} is remote. Leave --live out.")


def _load(options: argparse.Namespace) -> trained.TrainedRun:
    devices = runtime.start(options.devices)
    named = options.checkpoint
    checkpoint = named if named in ("best", "last") else int(named)
    return trained.load(str(options.run_dir), checkpoint, experiment=options.experiment, devices=devices)

"""`jaxdist verify`: the same steps on several layouts, compared with one device."""

import argparse
import json

from jaxdist.cli import selected_experiment
from jaxdist.errors import ExitStatus
from jaxdist.run.use import verify as verification


def verify(options: argparse.Namespace) -> int:
    """Compare layouts; exit 1 when a promise is broken."""
    devices, loaded = selected_experiment.start(options, options.devices or 8)
    experiment = loaded()
    with selected_experiment.record_alone_on_stdout(options):
        report = verification.verify(experiment, devices=devices, num_steps=options.steps)
    print(json.dumps(report.to_json()) if options.json else report)
    return ExitStatus.OK if report.kept else ExitStatus.FAILED

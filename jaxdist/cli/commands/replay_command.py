"""`jaxdist replay` and `jaxdist diff`: the steps of canonical runs, computed again and compared."""

import argparse
import json

from jaxdist.cli import selected_experiment
from jaxdist.errors import ExitStatus
from jaxdist.launch.joining import runtime
from jaxdist.run.replay import comparison, replaying
from jaxdist.rundir.remote import fetching


def replay(options: argparse.Namespace) -> int:
    """Compute a step again; exit 1 where it has other bits than recorded."""
    choice = fetching.newest_before(options.step)
    with selected_experiment.record_alone_on_stdout(options), fetching.fetched(options.run_dir, choice) as run_dir:
        made, _ = comparison.chain_of(run_dir)
        devices = runtime.start(options.devices, threads=lambda: made.extra.get("cpu_threads"))
        found = replaying.replay(run_dir, options.step, devices=devices, experiment=options.experiment)
    print(json.dumps(found.to_json()) if options.json else found)
    return ExitStatus.OK if not found.differences else ExitStatus.FAILED


def diff(options: argparse.Namespace) -> int:
    """Compare two runs step by step; exit 1 where they differ."""
    with fetching.all_fetched(options.run_dirs) as (first, second):
        found = comparison.compare(first, second)
    print(json.dumps(found.to_json()) if options.json else found)
    return ExitStatus.OK if found.equal else ExitStatus.FAILED

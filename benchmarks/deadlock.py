"""Whether a healthy job can stand still: jobs whose steps are trivial, so that communication is all they do.

python benchmarks/deadlock.py [--jobs 2x2 4x1] [--reductions canonical] [--steps N] [--steps-per-job N] [--json]

A job `PxD` has P processes of D fake CPU devices. Each is started anew until its steps are made; a job that hangs is
ended by its watchdog after `--hang-seconds` and counts as a hang, and the exit status is 1. Use more processes and
devices than there are cores: what is tried is programs that wait for each other and together need more threads than
XLA's pool has.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import jaxdist
from jaxdist import losses
from jaxdist.launch.supervising import supervisor
from jaxdist.models import mlp
from jaxdist.rundir import record


def get_config() -> jaxdist.Experiment:
    """Return an experiment whose step is next to nothing, with every snapshot and vote of a real run."""
    features = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int32)
    return jaxdist.Experiment(
        name="trivial",
        model=mlp.MLP(num_classes=2, width=4, num_layers=1),
        loss=losses.classification,
        data=jaxdist.Data(train=jaxdist.ArraySource({"image": features, "label": labels}), num_threads=0),
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1),
        global_batch_size=16,
        stop=jaxdist.Stop(max_steps=1000, max_seconds=86_400.0),
        checkpoints=jaxdist.Checkpoints(every_steps=1_000_000),
        guards=jaxdist.Guards(check_replicas_every=500),
        log_every=500,
        writers=("jsonl",),
    )


def main() -> int:
    """Run the jobs, print a row for each layout, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=["2x2", "4x1"], metavar="PxD")
    parser.add_argument("--reductions", nargs="+", default=["canonical"], choices=("canonical", "mean"))
    parser.add_argument("--steps", type=int, default=200_000, help="of each layout and reduction")
    parser.add_argument("--steps-per-job", type=int, default=10_000)
    parser.add_argument("--hang-seconds", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    hangs = 0
    for layout in options.jobs:
        for reduction in options.reductions:
            row = measure(layout, reduction, options)
            hangs += row["ours"]
            print(json.dumps(row) if options.json else "\n".join(f"{name:12} {value}" for name, value in row.items()))
    return int(hangs > 0)


def measure(layout: str, reduction: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return how many jobs were run in a layout, their steps, and how many hung."""
    begin, results = time.monotonic(), []
    for steps, failed in jobs(layout, reduction, options):
        results.append((steps, failed))
        print(f"{layout} {reduction}: {sum(steps for steps, _ in results)} steps, {failed} failed", file=sys.stderr)
    return {
        "name": f"attempts that hung or failed, {layout}, {reduction}",
        "ours": sum(failed for _, failed in results),
        "theirs": 0,
        "ratio": None,
        "unit": "attempts (theirs: what is allowed)",
        "repeats": len(results),
        "steps": sum(steps for steps, _ in results),
        "seconds": round(time.monotonic() - begin),
        "versions": record.versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[1]:.0f}",
    }


def jobs(layout: str, reduction: str, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Run jobs until the steps are made; yield the steps of each and how many of its attempts failed."""
    processes, devices = layout.split("x")
    for _ in range(-(-options.steps // options.steps_per_job)):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = pathlib.Path(folder) / "run"
            command = [sys.executable, "-m", "jaxdist.cli", "train", __file__, "--run-dir", str(run_dir), "--json"]
            command += ["--processes", processes, "--devices", devices, "--reduction", reduction]
            command += ["--max-steps", str(options.steps_per_job)]
            command += ["--set", f"recovery.hang_seconds={options.hang_seconds}"]
            done = subprocess.run(command, capture_output=True, text=True)
            made = record.RunRecord.read(run_dir)
            ends = [event for event in supervisor.read_events(run_dir) if event["event"] == "end"]
            failed = sum(event["status"] != 0 for event in ends)
            if failed or done.returncode:
                print(done.stderr, file=sys.stderr)
            yield made.step, max(failed, int(done.returncode != 0))


if __name__ == "__main__":
    sys.exit(main())

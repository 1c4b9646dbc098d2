"""Whether a healthy job can hang: jobs whose steps are trivial, so that they do little but communicate.

python benchmarks/deadlock.py [--jobs 2x2 4x1] [--reductions canonical] [--steps N] [--steps-per-job N] [--json]
python benchmarks/deadlock.py --log deadlock.jsonl --minutes 20      # a piece; the same command again continues

A job `PxD` has P processes of D fake CPU devices. Jobs of each kind are started until its steps are made. A job that
hangs is ended by its watchdog after `--hang-seconds` and counts as a hang, and the exit status is 1. Use more processes
and devices than there are cores: a hang needs programs that wait for each other and together need more threads than
XLA's pool has. With `--log` each job adds a line to a file, and the jobs in that file count, so the steps can be made
in pieces of `--minutes`. The layouts take turns.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

import jaxdist
from jaxdist import losses
from jaxdist.launch.supervising import restart_events
from jaxdist.models import mlp
from jaxdist.rundir import record


def get_config() -> jaxdist.Experiment:
    """Return an experiment whose step computes almost nothing, with every snapshot and vote of a real run."""
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
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further job after that")
    parser.add_argument("--log", type=pathlib.Path, help="file of the jobs, one JSON object a line; is appended to")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    kinds = [(layout, reduction) for layout in options.jobs for reduction in options.reductions]
    done = read_log(options.log)
    end = time.monotonic() + 60 * options.minutes
    while due := [kind for kind in kinds if num_steps(done, kind) < options.steps]:
        if time.monotonic() >= end:
            break
        kind = min(due, key=lambda kind: num_steps(done, kind))
        done.append(run_job(*kind, options))
        if options.log:
            with open(options.log, "a") as file:
                file.write(json.dumps(done[-1]) + "\n")
        print(f"{' '.join(kind)}: {num_steps(done, kind)} steps, {done[-1]['failed']} failed", file=sys.stderr)
    rows = [summary(kind, done) for kind in kinds]
    for row in rows:
        print(json.dumps(row) if options.json else "\n".join(f"{name:12} {value}" for name, value in row.items()))
    return int(any(row["ours"] for row in rows))


def read_log(path: pathlib.Path | None) -> list[dict[str, Any]]:
    """Return the jobs that a log holds."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def num_steps(done: list[dict[str, Any]], kind: tuple[str, str]) -> int:
    """Return how many steps the jobs of a layout and reduction made."""
    return sum(job["steps"] for job in done if (job["layout"], job["reduction"]) == kind)


def summary(kind: tuple[str, str], done: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many jobs were run in a layout, their steps, and how many attempts hung."""
    ours = [job for job in done if (job["layout"], job["reduction"]) == kind]
    load = max([job["load"] for job in ours], default=0)
    return {
        "name": f"attempts that hung or failed, {kind[0]}, {kind[1]}",
        "ours": sum(job["failed"] for job in ours),
        "theirs": 0,
        "ratio": None,
        "unit": "attempts (theirs: what is allowed)",
        "repeats": len(ours),
        "steps": num_steps(done, kind),
        "seconds": sum(job["seconds"] for job in ours),
        "versions": record.versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load up to {load}",
    }


def run_job(layout: str, reduction: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one job; return the steps that it made and how many of its attempts failed."""
    processes, devices = layout.split("x")
    begin, started = time.monotonic(), datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = pathlib.Path(folder) / "run"
        command = [sys.executable, "-m", "jaxdist.cli", "train", __file__, "--run-dir", str(run_dir), "--json"]
        command += ["--processes", processes, "--devices", devices, "--reduction", reduction]
        command += ["--max-steps", str(options.steps_per_job)]
        command += ["--set", f"recovery.hang_seconds={options.hang_seconds}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        ends = [event for event in restart_events.read_events(run_dir) if event["event"] == "end"]
        failed = max(sum(event["status"] != 0 for event in ends), int(done.returncode != 0))
        if failed:
            print(done.stderr, file=sys.stderr)
        return {
            "layout": layout,
            "reduction": reduction,
            "steps": record.RunRecord.read(run_dir).step,
            "failed": failed,
            "seconds": round(time.monotonic() - begin),
            "started": started.isoformat(timespec="seconds"),
            "load": round(os.getloadavg()[1], 1),
        }


if __name__ == "__main__":
    sys.exit(main())

"""Whole runs by parameter server: compared with all-reduce, and how long the death of a process delays them.

python benchmarks/parameter_server_runs.py [--steps N] [--rounds N] [--only all-reduce recovery] [--json]

Both sides train experiments/digits_cnn.py with two devices on this machine, in turns: the parameter server as two
workers and a server, all-reduce as one process with two devices. A side's time is the median time of a step.

For the recovery, processes of experiments/digits_mlp.py are killed just before they answer, or just after they decided,
with the default timers; what counts is the time from the kill to the next finished step.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from jaxdist.paramserver.processes import faults
from jaxdist.rundir import record

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
PARAMETER_SERVER = ("--strategy", "parameter-server")
RECOVERY_LIMIT = 2.0
DEATHS = (
    "worker/0 send Done",
    "server/0/a send CommitAck",
    "server/0/b send Replicated",
    "scheduler did CommitRecord",
)


def train(experiment: str, run_dir: pathlib.Path, *arguments: str, fault: str = "") -> dict[str, Any]:
    """Train in a process of its own; return the run record."""
    command = [sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENTS / f"{experiment}.py"), *arguments]
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir), "--json"],
        env=os.environ | {faults.FAULTS: fault, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def against_all_reduce(steps: int, rounds: int) -> dict[str, Any]:
    """Return milliseconds a step of both sides."""
    ours, theirs = [], []
    common = ("--max-steps", str(steps))
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings = ("--set", "ps.workers=2", "ps.servers=1")
            made = train("digits_cnn", pathlib.Path(folder, "a"), *common, *PARAMETER_SERVER, *settings)
            ours.append(1000 * made["step_seconds"]["p50"])
            made = train("digits_cnn", pathlib.Path(folder, "b"), *common, "--devices", "2")
            theirs.append(1000 * made["step_seconds"]["p50"])
    ratios = [mine / other for mine, other in zip(ours, theirs)]
    return row("digits CNN: parameter server / all-reduce", ours, theirs, ratios, "ms/step")


def recovery(death: str, rounds: int) -> dict[str, Any]:
    """Return the seconds from a kill to the next finished step."""
    waits = []
    settings = ("--set", "ps.workers=2", "ps.servers=1", "ps.durability=replicated")
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = pathlib.Path(folder, "run")
            fault = f"{death} {40 + 10 * number} kill"
            train("digits_mlp", run_dir, "--max-steps", "400", *PARAMETER_SERVER, *settings, fault=fault)
            waits.append(wait_after_fault(run_dir / "ps"))
    limits = [RECOVERY_LIMIT] * rounds
    return row(f"killed: {death}", waits, limits, [w / RECOVERY_LIMIT for w in waits], "s (theirs: the limit)")


def wait_after_fault(directory: pathlib.Path) -> float:
    (mark,) = (directory / "faults").iterdir()
    killed = mark.stat().st_mtime
    rows = [json.loads(line) for line in (directory / "steps.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows if "examples" in row]  # other lines are no steps
    return min(time for time in times if time > killed) - killed


def row(name: str, ours: list[float], theirs: list[float], ratios: list[float], unit: str) -> dict[str, Any]:
    return {
        "name": name,
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "unit": unit,
        "repeats": len(ours),
        "versions": record.versions(),
    }


def show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found), flush=True)
    else:
        numbers = f"{found['ours']:9.3f} {found['theirs']:9.3f} {found['unit']}, ratio {found['ratio']:.2f}"
        print(f"{found['name']:44} {numbers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("all-reduce", "recovery"), default=("all-reduce", "recovery"))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if "all-reduce" in options.only:
        show(against_all_reduce(options.steps, options.rounds), options.json)
    for death in DEATHS if "recovery" in options.only else ():
        show(recovery(death, options.rounds), options.json)


if __name__ == "__main__":
    main()

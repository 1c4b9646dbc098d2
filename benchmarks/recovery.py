"""The cost of a crash: jobs whose processes are killed or stopped, and the cost of snapshots.

python benchmarks/recovery.py kills [--kills N] [--seed S] [--experiment FILE] [--processes P] [--json]
python benchmarks/recovery.py random [--experiments FILE ...] [--strategies S ...] [--log FILE] [--minutes M] [--json]
python benchmarks/recovery.py stops [--stops N] [--seed S] [--json]
python benchmarks/recovery.py snapshot [--rounds N] [--every N ...] [--json]

`kills` is `jaxdist chaos` with SIGKILLs alone and default timers: the seconds from a kill to the next step that had
not been made, their parts, and whether params and ledger are those of the undisturbed run. `--steps-per-kill` sets how
far apart they are. `random` is the same with processes that join and leave, for each experiment with each strategy,
three seconds of training a strike; with a log it is run in pieces. `stops` stops processes of a small job and checks
whether the watchdog named the right one, and how long after its limit. `snapshot` trains with snapshots, at the default
interval and every n steps, and without any, in turns of the same process, on two devices; the ratio is the median of
that of the steps per second of neighbouring rounds.

A long run is 100 kills, 20 stops and the snapshots, on a quiet machine.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxdist import stop
from jaxdist.checkpoint import snapshots as snapshot
from jaxdist.config import experiment as config
from jaxdist.config import loading
from jaxdist.launch.joining import runtime
from jaxdist.launch.supervising.chaos import chaos_runs
from jaxdist.run import components, loop, recovery, stopwatch
from jaxdist.rundir import record

ROOT = pathlib.Path(__file__).parents[1]
ALLOWED_SECONDS = RANDOM_SECONDS = 2.0
PROGRAMS = ("digits_cnn.py", "digits_mlp.py", "bytes_gpt.py", "digits_resnet.py")
HANG_SECONDS = 3.0
ROUND_SECONDS = 1.0
SECONDS_PER_STRIKE = 3.0
PILOT_STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "random", "stops", "snapshot"))
    parser.add_argument("--experiment", default=str(ROOT / "experiments" / "digits_cnn.py"))
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps-per-kill", type=int, default=2)
    parser.add_argument("--experiments", nargs="+", default=[str(ROOT / "experiments" / name) for name in PROGRAMS])
    parser.add_argument("--strategies", nargs="+", default=["data-parallel", "zero1", "fsdp"])
    parser.add_argument("--joins", type=int, default=1)
    parser.add_argument("--leaves", type=int, default=1)
    parser.add_argument("--log", type=pathlib.Path, help="file of finished jobs, which are not run again")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no job is begun after so many")
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    # Like Ctrl-C, so that the running job ends too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows = {"kills": kills, "random": random_changes, "stops": stops, "snapshot": snapshots}[options.what](options)
    for row in rows:
        row |= {"versions": record.versions(), "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
        print(json.dumps(row) if options.json else "\n".join(f"{name:12} {value}" for name, value in row.items()))


def kills(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    arguments = [options.experiment, "--processes", str(options.processes), "--devices", "1"]
    arguments += ["--max-steps", str(max(60, options.steps_per_kill * options.kills))]
    report = fire(options.experiment, arguments, options, kills=options.kills)
    found = report.to_json()
    yield {
        "name": f"kill to next step, {pathlib.Path(options.experiment).stem}, {options.processes} processes",
        "ours": found["lost_seconds"]["p50"],
        "theirs": ALLOWED_SECONDS,
        "ratio": found["lost_seconds"]["p50"] / ALLOWED_SECONDS,
        "unit": "s (theirs: what is allowed)",
        "repeats": len(report.hits),
        "each": [round(hit.seconds, 2) for hit in report.hits],
        "report": found,
    }


def random_changes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row of each experiment with each strategy; `--kills`, `--joins` and `--leaves` are those of one row."""
    end = time.monotonic() + 60 * options.minutes
    done = [] if options.log is None or not options.log.exists() else options.log.read_text().splitlines()
    rows = {row["name"]: row for row in map(json.loads, done)}
    for experiment, strategy in itertools.product(options.experiments, options.strategies):
        name = f"{pathlib.Path(experiment).stem}, {strategy}, {options.processes} processes, seed {options.seed}"
        if name not in rows and time.monotonic() < end:
            rows[name] = {"name": name} | _changed_at_random(experiment, strategy, options)
            if options.log is not None:
                with open(options.log, "a") as log:
                    log.write(json.dumps(rows[name]) + "\n")
        if name in rows:
            yield rows[name]


def _changed_at_random(experiment: str, strategy: str, options: argparse.Namespace) -> dict[str, Any]:
    arguments = [experiment, "--processes", str(options.processes), "--devices", "1", "--strategy", strategy]
    strikes = options.kills + options.joins + options.leaves
    steps = int(SECONDS_PER_STRIKE * strikes / _pace([*arguments, "--max-steps", str(PILOT_STEPS)]))
    arguments += ["--max-steps", str(max(60, steps))]
    wanted = {"kills": options.kills, "joins": options.joins, "leaves": options.leaves}
    found = fire(experiment, arguments, options, **wanted).to_json()
    costs = found["lost_seconds"]
    return {
        "ours": costs["p50"],
        "theirs": RANDOM_SECONDS,
        "ratio": costs["p50"] / RANDOM_SECONDS,
        "unit": "s from a kill to the next new step (theirs: what is allowed)",
        "repeats": sum(found["strikes"].values()),
        "identical": found["identical"],
        "strikes": f"{found['made']} of {found['planned']}",
        "longest": costs["max"],
        "report": found,
    }


def _pace(arguments: list[str]) -> float:
    """Return the seconds a step of a short run takes: a job of fast steps would end before it is struck."""
    with tempfile.TemporaryDirectory(prefix="jaxdist-recovery-") as folder:
        train = [*_train_command(arguments), "--run-dir", f"{folder}/pilot"]
        subprocess.run(train, check=True, capture_output=True, timeout=600)
        return record.RunRecord.read(pathlib.Path(folder, "pilot")).step_seconds["p50"]


def stops(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    experiment = str(ROOT / "tests" / "tiny_experiment.py")
    arguments = [experiment, "--processes", "2", "--devices", "1", "--max-steps", str(4 * options.stops)]
    report = fire(experiment, arguments, options, f"recovery.hang_seconds={HANG_SECONDS}", stops=options.stops)
    found = report.to_json()
    yield {
        "name": "stop to verdict, tiny experiment, 2 processes",
        "ours": found["verdict_seconds"]["p50"],
        "theirs": HANG_SECONDS,
        "ratio": found["verdict_seconds"]["p50"] / HANG_SECONDS,
        "unit": "s (theirs: recovery.hang_seconds)",
        "repeats": found["verdicts"]["of"],
        "right": found["verdicts"]["right"],
        "report": found,
    }


def fire(
    experiment: str, arguments: list[str], options: argparse.Namespace, *settings: str, **strikes: int
) -> chaos_runs.ChaosResult:
    command = [*_train_command(arguments), *settings]
    with tempfile.TemporaryDirectory(prefix="jaxdist-recovery-") as folder:
        found = chaos_runs.run(
            command,
            pathlib.Path(folder),
            seed=options.seed,
            num_processes=int(arguments[arguments.index("--processes") + 1]),
            num_examples=len(loading.load_experiment(experiment).data.train),
            counts={"kills": 0, **strikes},
        )
    if not found.hits:
        raise SystemExit("The job ended before any of its processes was struck: make it longer, with --steps-per-kill.")
    return found


def _train_command(arguments: list[str]) -> list[str]:
    command = [sys.executable, "-m", "jaxdist.cli", "train", *arguments, "--reduction", "canonical"]
    # Otherwise a run ends when its model is good enough, long before the last strike.
    command += ["--set", "stop.target=None", "stop.max_epochs=None", "recovery.ledger=true"]
    return [*command, "recovery.max_fruitless=1000000"]


def snapshots(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    devices = runtime.start(2)
    for name in ("digits_cnn", "bytes_gpt"):
        experiment = loading.load_experiment(str(ROOT / "experiments" / f"{name}.py"))
        trainer = _Trainer(components.put_together(experiment, devices=devices))
        for every in [None, *options.every]:
            sides: dict[str, list[float]] = {"with": [], "without": []}
            hooks = {"with": trainer.snapshot_hook(every), "without": None}
            for side in [*sides] * (options.rounds + 1):
                sides[side].append(trainer.rate(hooks[side]))
            with_, without = (rates[1:] for rates in sides.values())  # the first round warms up
            yield {
                "name": f"steps a second with a snapshot every {every or 'so often (default)'}, {name}",
                "ours": statistics.median(with_),
                "theirs": statistics.median(without),
                "ratio": statistics.median(a / b for a, b in zip(with_, without, strict=True)),
                "unit": "steps/s (theirs: without snapshots)",
                "repeats": options.rounds,
            }
        trainer.close()


class _Trainer:
    """Trains one model, with snapshots as `jaxdist train` takes them or without."""

    def __init__(self, parts: components.Parts):
        self._parts, self._state = parts, parts.create_state()
        self._batches = [item for item, _ in zip(parts.batches(), range(8))]
        self._progress, self._times = stop.Progress(), stopwatch.StepTimes()
        self._folder = tempfile.TemporaryDirectory(prefix="jaxdist-recovery-", dir="/dev/shm")
        self._snapshots = snapshot.Snapshots(pathlib.Path(self._folder.name), identity="benchmark")
        self._steps = 8
        self._steps = max(8, int(ROUND_SECONDS * max(self.rate(None) for _ in range(3))))

    def snapshot_hook(self, every: int | None) -> loop.Hook:
        """Return the hook that takes them every n steps, or as often as by default."""
        settings = config.Recovery(snapshot_every=every)
        return recovery.snapshots_when_due(
            self._snapshots, settings, lambda: self._times.quantile(0.5), lambda value: value, lambda: None
        )

    def rate(self, hook: loop.Hook | None) -> float:
        """Return steps a second."""
        rule = stop.max_steps(self._progress.step + self._steps)
        begin = time.perf_counter()
        result = loop.fit(
            self._parts.step,
            self._state,
            itertools.cycle(self._batches),
            stop=rule,
            hooks=[hook] if hook else [],
            progress=self._progress,
            step_times=self._times,
        )
        jax.block_until_ready(result.state.params)
        self._snapshots.wait()
        self._state, self._progress = result.state, result.progress
        return self._steps / (time.perf_counter() - begin)

    def close(self) -> None:
        self._snapshots.close()
        self._folder.cleanup()


if __name__ == "__main__":
    main()

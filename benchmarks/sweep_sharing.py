"""Trials that differ in their learning rate: with programs shared as `jaxdist sweep` does, and each put together anew.

Both sides run interleaved in one process with a warm compilation cache on disk, which both use. Per trial, seconds: all
of it, and the part in which programs are traced, lowered and loaded.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax

from jaxdist.config.loading import load_experiment
from jaxdist.config.overrides import override
from jaxdist.launch.joining import runtime
from jaxdist.run import attempt
from jaxdist.run.sweeps.shared_programs import SharedPrograms
from jaxdist.rundir import record

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
EXPERIMENTS = ("digits_mlp", "digits_cnn", "bytes_gpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(FOLDER))
    devices = runtime.start(options.devices)
    rows = [measure(name, devices, options.repeats) for name in EXPERIMENTS]
    for row in rows:
        print(json.dumps(row) if options.json else show(row))


def measure(name: str, devices: list[jax.Device], repeats: int) -> dict:
    """Return medians over trials after the first of each side."""
    base = override(load_experiment(str(FOLDER / f"{name}.py")), ["stop.max_steps=4", "stop.target=none"])
    shared = SharedPrograms()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    compiling: dict[str, list[float]] = {"ours": [], "theirs": []}
    counts = set()
    for trial in range(repeats + 1):
        experiment = override(base, [f"optimizer.learning_rate={1e-3 * (trial + 1)}"])
        hashes = set()
        for side in ("theirs", "ours"):
            more = {"put_together": shared.put_together} if side == "ours" else {}
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                run = attempt.RunOptions(run_dir=pathlib.Path(folder) / "run", silent=True, **more)
                made = attempt.train(experiment, run, devices=devices)
                took = time.perf_counter() - begin
            hashes.add(made.params_sha256)
            if trial:
                seconds[side].append(took)
                compiling[side].append(made.time_seconds["compile"])
                counts |= {(side, made.compile_count)}
        assert len(hashes) == 1, "sharing changed the bits"
    assert counts == {("ours", 0), ("theirs", 1)}, counts
    ours, theirs = (statistics.median(seconds[side]) for side in ("ours", "theirs"))
    return {
        "name": f"sweep_sharing/{name}",
        "ours": round(ours, 3),
        "theirs": round(theirs, 3),
        "ratio": round(ours / theirs, 3),
        "unit": "seconds a trial of 4 steps",
        "compile_seconds": {side: round(statistics.median(values), 3) for side, values in compiling.items()},
        "repeats": repeats,
        "versions": record.versions(),
    }


def show(row: dict) -> str:
    """Return a row for people."""
    compiling = row["compile_seconds"]
    return (
        f"{row['name']:<26} shared {row['ours']:6.2f} s, anew {row['theirs']:6.2f} s, ratio {row['ratio']:.2f}; "
        f"compile {compiling['ours']:.2f} and {compiling['theirs']:.2f} s"
    )


if __name__ == "__main__":
    main()

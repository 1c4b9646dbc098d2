"""What saving a state costs, beside Orbax's own asynchronous checkpoint of it.

python benchmarks/checkpoints.py [--sizes N ...] [--repeats N] [--json]

A state is params and two moments, of a small CNN or of so many bytes, on two devices, replicated or sharded over them
by rows. Both sides save it in turns, each until it is committed; ours hashes it, too. A ratio is that of the medians of
CPU time, ours / theirs; `blocked` is how long the training loop waits. Both wait for the disk.
"""

import argparse
import json
import logging
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import make_mesh
from jaxdist.checkpoint import checkpoints
from jaxdist.rundir import record

_CNN = [(3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,), (1024, 64), (64,), (64, 10), (10,)]
_ROW = 1024
_KEPT = 2


def make_state(num_bytes: int, spec: PartitionSpec) -> dict[str, Any]:
    """Return params and two moments of `num_bytes` together, of a small CNN for 0."""
    shapes = [(num_bytes // (12 * 4 * _ROW), _ROW)] * 4 if num_bytes else _CNN
    mesh, rows = make_mesh(), np.random.default_rng(0)

    def put(shape: tuple[int, ...]) -> jax.Array:
        placed = spec if shape[0] % 2 == 0 else PartitionSpec()
        return jax.device_put(rows.normal(size=shape).astype(np.float32), NamedSharding(mesh, placed))

    return {part: [put(shape) for shape in shapes] for part in ("params", "mu", "nu")}


def timed(save: Callable[[], None], wait: Callable[[], None]) -> tuple[float, float, float]:
    """Return the milliseconds of CPU time and of wall time that a save takes, and those until it returns."""
    cpu, wall = time.process_time(), time.perf_counter()
    save()
    blocked = time.perf_counter() - wall
    wait()
    return (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3, blocked * 1e3


def measure(num_bytes: int, sharded: bool, repeats: int) -> dict[str, Any]:
    """Return the row of one state."""
    state = make_state(num_bytes, PartitionSpec("data") if sharded else PartitionSpec())
    times: dict[str, list[tuple[float, float, float]]] = {"ours": [], "theirs": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoints.Checkpointer(f"{folder}/ours", identity="benchmark", keep_last=_KEPT) as ours,
        ocp.CheckpointManager(f"{folder}/theirs", options=ocp.CheckpointManagerOptions(max_to_keep=_KEPT)) as theirs,
    ):
        for step in range(1, repeats + 3):
            saves = {
                "ours": (lambda step=step: ours.save(step, state, {}, {}), ours.wait),
                "theirs": (
                    lambda step=step: theirs.save(step, args=ocp.args.StandardSave(state)),
                    theirs.wait_until_finished,
                ),
            }
            for side, (save, wait) in saves.items():
                found = timed(save, wait)
                times[side] += [found] if step > 2 else []  # the first load programs and fill the folder
        files = {side: _num_files(pathlib.Path(folder, side, str(repeats + 2))) for side in times}
    ours_ms, theirs_ms = ([statistics.median(each) for each in zip(*times[side])] for side in ("ours", "theirs"))
    return {
        "name": f"{num_bytes or 'cnn'}-{'sharded' if sharded else 'replicated'}",
        "ours": ours_ms[0],
        "theirs": theirs_ms[0],
        "ratio": ours_ms[0] / theirs_ms[0],
        "unit": "ms of CPU time",
        "wall": [ours_ms[1], theirs_ms[1]],
        "blocked": [ours_ms[2], theirs_ms[2]],
        "files": list(files.values()),
        "repeats": repeats,
        "versions": record.versions(),
    }


def _num_files(folder: pathlib.Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def line(row: dict[str, Any]) -> str:
    """Return a row for people."""
    pairs = {name: f"{row[name][0]:.1f} / {row[name][1]:.1f}" for name in ("wall", "blocked")}
    return (
        f"{row['name']:22} CPU {row['ours']:.1f} / {row['theirs']:.1f} ms ({row['ratio']:.2f})  wall {pairs['wall']}  "
        f"blocked {pairs['blocked']}  files {row['files'][0]} / {row['files'][1]}"
    )


def main() -> None:
    """Measure states of each size in both layouts, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 200_000_000], help="bytes; 0 is a small CNN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    logging.getLogger("absl").setLevel(logging.ERROR)
    for num_bytes in options.sizes:
        for sharded in (False, True):
            row = measure(num_bytes, sharded, options.repeats)
            print(json.dumps(row) if options.json else line(row), flush=True)


if __name__ == "__main__":
    main()

"""What hashes of steps and audits cost in canonical mode.

python benchmarks/step_hashes.py [--devices N] [--rounds N] [--only WORK ...] [--audit-every N] [--json]

The works are those of benchmarks/overhead.py. All sides make the same canonical steps on batches in device memory, in
turns, in a random order; a ratio is the median over the rounds. `hashes` is the step with hashes, which are read and
written as a run does; `audits` is that with one logical shard audited every N steps. The ratios are of throughput:
without hashes / with them.
"""

import argparse
import json
import pathlib
import random
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
import overhead
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import make_mesh
from jaxdist.guards import shard_audit, step_hashes
from jaxdist.run import components, loop
from jaxdist.run.replay import auditing, recording, step_chain
from jaxdist.rundir import record
from jaxdist.spmd import state as states
from jaxdist.spmd.canonical import canonical_step

LOGICAL_SHARDS = 8
LEAST_RATIO = 0.97
ROUND_SECONDS = 0.5


class Side:
    """Canonical training of a work with some of the guards."""

    def __init__(self, work: overhead.Work, folder: pathlib.Path, *, hashes: bool, audit_every: int | None):
        self.mesh = make_mesh()
        random_rows, sharding = np.random.default_rng(0), NamedSharding(self.mesh, PartitionSpec("data"))
        self.batches = [jax.device_put(work.batch(random_rows), sharding) for _ in range(overhead.NUM_BATCHES)]
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in self.batches[0].items()}
        functions = components.make_functions(work.experiment, shapes)
        hashing = step_hashes.StepHashing() if hashes else canonical_step.NO_HASHING
        self.step = canonical_step.canonical_step(
            functions.loss_fn, work.optimizer, self.mesh, logical_shards=LOGICAL_SHARDS, hashing=hashing
        )
        self.state = states.create_state(functions.init_fn, work.optimizer, mesh=self.mesh, seed=0)
        self.count, self.hook, self.auditor = 0, None, None
        if hashes:
            form = step_chain.Form(LOGICAL_SHARDS, tuple(step_hashes.names(self.state)))
            self.hook = recording.ChainRecorder(step_chain.ChainFile(folder, form, step=0, compares=False))
        if audit_every:
            audit = shard_audit.ShardAudit(
                functions.loss_fn, self.mesh, logical_shards=LOGICAL_SHARDS, num_microbatches=1
            )
            schedule = auditing.AuditSchedule(audit_every, LOGICAL_SHARDS, seed=0)
            self.auditor = auditing.Auditor(audit, schedule, list(self.mesh.devices.flat), ends=True)

    def run(self, num_steps: int) -> float:
        """Make so many steps more; return the seconds that one took."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self.make_step()
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / num_steps

    def make_step(self) -> None:
        """Make a step as a run does."""
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        if self.auditor:
            self.auditor.before(self.state, batch, self.count)
        self.state, metrics = self.step(self.state, batch)
        if self.auditor:
            self.auditor.after(metrics)
        if self.hook:
            nothing: Any = None
            self.hook(loop.StepInfo(self.count, self.state, metrics, nothing, nothing))


def measure(name: str, *, rounds: int, audit_every: int) -> list[dict[str, Any]]:
    """Return a row for hashes and one for audits."""
    work = overhead.make_work(name)
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder) / side for side in ("plain", "hashes", "audits")]
        for path in paths:
            path.mkdir()
        sides = [
            Side(work, path, hashes=index > 0, audit_every=audit_every if index == 2 else None)
            for index, path in enumerate(paths)
        ]
        for side in sides:
            side.run(audit_every)  # compiles all
        num_steps = audit_every * max(1, round(ROUND_SECONDS / (sides[0].run(audit_every) * audit_every)))
        seconds: list[list[float]] = [[], [], []]
        for _ in range(rounds):
            for index in random.sample(range(3), 3):
                seconds[index].append(sides[index].run(num_steps))
    rows = []
    for index, title in ((1, "hashes"), (2, f"hashes, audit every {audit_every}")):
        ratio = statistics.median(plain / own for plain, own in zip(seconds[0], seconds[index], strict=True))
        rows.append(
            {
                "name": f"{name}: {title}",
                "ours": 1e3 * statistics.median(seconds[index]),
                "theirs": 1e3 * statistics.median(seconds[0]),
                "ratio": ratio,
                "unit": "ms a step, with / without",
                "repeats": rounds,
                "versions": record.versions(),
            }
        )
    return rows


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=overhead.WORKS, default=["mlp", "cnn-64", "gpt"])
    parser.add_argument("--audit-every", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    for name in options.only:
        for row in measure(name, rounds=options.rounds, audit_every=options.audit_every):
            missed = "" if row["ratio"] >= LEAST_RATIO else f"  MISSED ({LEAST_RATIO})"
            line = f"{row['name']:<34} {row['ours']:9.3f} ms {row['theirs']:9.3f} ms  ratio {row['ratio']:.3f}{missed}"
            print(json.dumps(row) if options.json else line, flush=True)


if __name__ == "__main__":
    main()

"""What it costs that the processes of a job agree, at every step, whether to stop: through the coordinator's store.

python benchmarks/agreement.py [--processes P] [--rounds N] [--json]

Each process makes steps with one all-reduce, as a training loop does: up to eight are dispatched before it waits. The
sides take turns in the same processes: a loop that cannot be stopped (`none`), one that asks `agreement` after each
step (`store`), and one that adds up a flag by a collective of its own and reads it eight steps later (`collective`),
which is what one would write by hand; with several devices a process, that one can hang. `trivial` is
a step that does next to nothing, `small` one of a few milliseconds. A round's ratio is that of neighbours in time, and
the median over the rounds is shown. On a busy machine that is inexact; the median time of one question, in the thread
that trains, is not.
"""

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist import testing
from jaxdist.launch.joining import agreement
from jaxdist.rundir import record

WORKS = {"trivial": (8, 1), "small": (256, 8)}
"""Width of a step's square matrices, and how many products it makes."""
SIDES = ("none", "store", "collective")
MOST_AHEAD = 8
TURN_SECONDS, WARM_STEPS = 0.5, 60
ROWS = {"store / none": ("store", "none"), "store / collective": ("store", "collective")}


def main() -> int:
    """Measure, print a row for each pair of sides, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for work in WORKS:
        measured = testing.run_processes(
            measure, work, options.rounds, processes=options.processes, timeout_seconds=3600.0
        )[0]
        speeds, questions = measured
        rows = [summary(name, speeds[ours], speeds[theirs], "steps/s") for name, (ours, theirs) in ROWS.items()]
        rows.append(summary("a question, store / collective", questions["store"], questions["collective"], "us"))
        for row in rows:
            row["name"] = f"{work}, {options.processes} processes: {row['name']}"
            print(json.dumps(row) if options.json else describe(row))
    return 0


def summary(name: str, ours: list[float], theirs: list[float], unit: str) -> dict[str, Any]:
    """Return the row of what two sides measured, a value for each round."""
    return {
        "name": name,
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)),
        "unit": unit,
        "repeats": len(ours),
        "versions": record.versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[1]:.1f}",
    }


def describe(row: dict[str, Any]) -> str:
    """Return the row as a line."""
    numbers = f"{row['ours']:10.2f} {row['theirs']:10.2f}  {row['unit']}  {row['ratio']:.4f}"
    return f"{row['name']:58} {numbers}  {row['machine']}"


def measure(work: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the steps a second of each side in each round, and the median microseconds of its question.

    Every process of a job calls this.
    """
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    loop = Loop(mesh, *WORKS[work])
    loop.run(20, lambda step: False)
    start = time.perf_counter()
    loop.run(50, lambda step: False)
    # The same number in every process: the clock of the first one decides.
    steps = int(agreed_number(max(20, 50 * TURN_SECONDS / (time.perf_counter() - start)), mesh))
    order = random.Random(0)
    speeds, questions = ({side: [] for side in SIDES} for _ in range(2))
    for _ in range(rounds):
        for side in order.sample(SIDES, len(SIDES)):
            with making_vote(side, mesh) as vote:
                loop.run(WARM_STEPS, vote)  # decisions follow each other at every step until the pace is known
                start = time.perf_counter()
                asked = loop.run(steps, vote, after=WARM_STEPS)
                speeds[side].append(steps / (time.perf_counter() - start))
                questions[side].append(1e6 * statistics.median(asked))
    return speeds, questions


class Loop:
    """Makes steps: some products of matrices, then an all-reduce."""

    def __init__(self, mesh: Mesh, width: int, products: int):
        split, whole = NamedSharding(mesh, PartitionSpec("device")), NamedSharding(mesh, PartitionSpec())

        def step(state: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            for _ in range(products):
                rows = jnp.tanh(rows @ state)
            state = state + 1e-6 * jnp.mean(rows, axis=0)
            return state, state[0, 0]

        self.step = jax.jit(step, in_shardings=(whole, split), out_shardings=(whole, whole), donate_argnums=0)
        rows = np.ones((mesh.size, width, width), np.float32)
        self.rows = jax.make_array_from_callback(rows.shape, split, lambda index: rows[index])
        self.state = jax.make_array_from_callback((width, width), whole, lambda index: np.zeros((width, width))[index])

    def run(self, steps: int, vote: Callable[[int], bool], *, after: int = 0) -> list[float]:
        """Make so many more steps, asking after each whether to stop; return the seconds of each question."""
        asked = []
        ahead: collections.deque[jax.Array] = collections.deque()
        for step in range(after + 1, after + steps + 1):
            self.state, done = self.step(self.state, self.rows)
            ahead.append(done)
            if len(ahead) > MOST_AHEAD:
                jax.block_until_ready(ahead.popleft())
            start = time.perf_counter()
            if vote(step):
                raise AssertionError("no stop was requested")
            asked.append(time.perf_counter() - start)
        jax.block_until_ready(self.state)
        return asked


@contextlib.contextmanager
def making_vote(side: str, mesh: Mesh) -> Any:
    """Yield the function of a side that is asked after each step whether to stop."""
    if side == "none":
        yield lambda step: False
    elif side == "collective":
        yield CollectiveVote(mesh)
    else:
        with agreement.of_job() as agreed:
            yield agreed.stop(lambda step: False)


class CollectiveVote:
    """Adds up a flag of each device after each step, and reads the sum some steps later."""

    def __init__(self, mesh: Mesh):
        self.split = NamedSharding(mesh, PartitionSpec("device"))
        self.add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.size, self.sums = mesh.size, collections.deque()

    def __call__(self, step: int) -> bool:
        """Return whether any process asked to stop, as far as is known."""
        flags = jax.make_array_from_callback((self.size,), self.split, lambda index: np.zeros(1, np.int32))
        self.sums.append(self.add(flags))
        return len(self.sums) > MOST_AHEAD and int(self.sums.popleft()) > 0


def agreed_number(number: float, mesh: Mesh) -> float:
    """Return the mean of the processes' numbers."""
    split = NamedSharding(mesh, PartitionSpec("device"))
    numbers = jax.make_array_from_callback((mesh.size,), split, lambda index: np.full(1, number, np.float32))
    return float(jax.jit(jnp.mean, out_shardings=NamedSharding(mesh, PartitionSpec()))(numbers))


if __name__ == "__main__":
    sys.exit(main())

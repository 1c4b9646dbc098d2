"""How much staleness helps when workers straggle: time to a target accuracy against the bound, on a simulated clock.

python experiments/staleness.py [--json] [--figure docs/staleness.svg]

Gradients, optimizer, scheduler, servers and workers are the real ones; only the clock and the network are simulated. A
gradient takes a second, and one in ten takes six. Bound 0 is bulk-synchronous: a step waits for all workers, each with
its slice. With a larger bound a worker pushes by itself and may be that many steps ahead of the slowest. A worker's
gradient is over the same number of examples in both, and each bound is run with the learning rate that is best for it.

The second part has one worker that is always five times slower, and a backup worker, so that a synchronous step need
not wait for the slow one.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import digits_mlp
import jax

import jaxdist
from jaxdist import data
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.models import mlp
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.settings import Settings, Timers
from jaxdist.paramserver.run import island, shard_optimizer, shared_plan
from jaxdist.paramserver.simulator import Faults, Simulation
from jaxdist.rundir import record
from jaxdist.spmd import evaluate

BOUNDS = (0, 1, 2, 4, 8, 16)
RATES = (0.2, 0.4, 0.8, 1.6)
"""Learning rates of a step over all workers' examples; a single push is applied with the worker's share of it."""
SLOW, SHARE_SLOW = 6.0, 0.1
TIMERS = Timers(heartbeat=0.5, retry=1.0, dead_after=5.0, stuck_after=600.0)
MOST_SECONDS = 5000.0
NEVER = 1 << 40


class Reached(Exception):
    """The target is reached, or out of reach within the time given."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained, by how many workers."""

    workers: int = 8
    worker_batch_size: int = 16
    width: int = 64

    def experiment(self, *, synchronous: bool) -> jaxdist.Experiment:
        """Return the digits MLP; one push is a worker's batch, one synchronous step all workers'."""
        pushes = self.workers if synchronous else 1
        return dataclasses.replace(
            digits_mlp.get_config(),
            model=mlp.MLP(num_classes=10, width=self.width),
            optimizer=jaxdist.Optimizer(name="sgd", learning_rate=1.0),
            global_batch_size=self.worker_batch_size * pushes,
        )


@dataclasses.dataclass
class Run:
    """The result of one simulated run."""

    seconds: float = float("inf")
    steps: int = 0
    busy: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    staleness: list[int] = dataclasses.field(default_factory=list)

    def waiting(self, workers: int, end: float) -> float:
        """Return the share of all workers' time until `end` in which they did not compute."""
        computed = sum(min(begin + seconds, end) - begin for begin, seconds in self.busy if begin < end)
        return 1.0 - computed / (workers * end)


class Laboratory:
    """Simulates runs of one problem in one mode; compiles once."""

    def __init__(self, problem: Problem, *, synchronous: bool, backup_workers: int = 0) -> None:
        self.problem, self.synchronous = problem, synchronous
        mode = "sync" if synchronous else "async"
        chosen = ParameterServer(workers=problem.workers, mode=mode, backup_workers=backup_workers)
        self.plan = shared_plan.make_plan(problem.experiment(synchronous=synchronous), chosen)
        self.island = island.Island(self.plan, jax.local_devices()[:1])
        self.eval_step = evaluate.eval_step(self.plan.functions.eval_fn)
        held_out = self.plan.experiment.data.eval
        loader = data.Loader(
            held_out, global_batch_size=len(held_out), seed=0, shuffle=False, num_epochs=1, num_threads=0
        )
        self.held_out = [jax.device_put(batch) for batch, _ in loader]
        self.params = self.plan.sharding.split(shared_plan.initial_leaves(self.plan))

    def settings(self, bound: int) -> Settings:
        """Return the settings of a run that ends when it is interrupted."""
        return dataclasses.replace(
            self.plan.settings,
            mode="bounded",
            max_staleness=bound,
            max_steps=NEVER,
            read_every=(),
            timers=TIMERS,
        )

    def run(
        self,
        bound: int,
        rate: float,
        seed: int,
        *,
        seconds: Callable[[random.Random, int], float],
        target: float,
        most_seconds: float = MOST_SECONDS,
    ) -> Run:
        """Simulate until the held-out accuracy is `target`, or `most_seconds` have passed on the simulated clock."""
        made, problem = Run(), self.problem
        optax = jaxdist.optimizers.build(
            jaxdist.Optimizer(name="sgd", learning_rate=rate if self.synchronous else rate / problem.workers),
            global_batch_size=problem.worker_batch_size,
            steps_per_epoch=NEVER,
            max_steps=NEVER,
        )

        def compute_seconds(rng: random.Random, worker: int) -> float:
            taken = seconds(rng, worker)
            made.busy.append((simulation.now, taken))
            return taken

        def gradient(lease: messages.Lease, params: Any) -> messages.Computed:
            if len(made.busy) % problem.workers == 1:
                self._look(made, simulation.now, params, target, most_seconds)
            return self.island.gradient(effects.Compute(0, 0, lease, params))

        simulation = Simulation(
            seed=seed,
            settings=self.settings(bound),
            faults=Faults(until=0.0),
            params=self.params,
            gradient=gradient,
            make_updater=lambda: shard_optimizer.OptaxUpdater(optax, kind="elementwise", shapes=self._shapes()),
            compute_seconds=compute_seconds,
        )
        try:
            simulation.run(patience=2 * most_seconds)
        except Reached:
            applied = [event.what for event in simulation.events if isinstance(event.what, effects.Applied)]
            made.steps, made.staleness = len(applied), [effect.staleness for effect in applied]
        return made

    def _shapes(self) -> list[tuple[int, ...]]:
        return [self.plan.sharding.shape(block) for block in self.plan.sharding.shards[0]]

    def _look(self, made: Run, now: float, params: Any, target: float, most_seconds: float) -> None:
        whole, model_state = jax.tree.unflatten(self.plan.structure, self.plan.sharding.join(params))
        accuracy = evaluate.evaluate(self.eval_step, whole, model_state, self.held_out)["accuracy"]
        made.curve.append((now, accuracy))
        if accuracy >= target:
            made.seconds = now
        if accuracy >= target or now > most_seconds:
            raise Reached


def straggling(rng: random.Random, worker: int) -> float:
    """Return how long a gradient takes: about a second, or SLOW times that."""
    return rng.uniform(0.9, 1.1) * (SLOW if rng.random() < SHARE_SLOW else 1.0)


def sweep(
    laboratories: dict[bool, Laboratory],
    bounds: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
    target: float,
) -> list[dict[str, Any]]:
    """Return a row for each bound, with the rate that reaches the target first."""
    rows = []
    for bound in bounds:
        laboratory = laboratories[bound == 0]
        runs = {
            rate: [laboratory.run(bound, rate, seed, seconds=straggling, target=target) for seed in seeds]
            for rate in rates
        }
        rate, best = min(runs.items(), key=lambda item: statistics.median(run.seconds for run in item[1]))
        median = sorted(best, key=lambda run: run.seconds)[len(best) // 2]
        end = median.curve[-1][0]
        rows.append(
            {
                "bound": bound,
                "seconds": median.seconds,
                "waiting": median.waiting(laboratory.problem.workers, end),
                "steps_per_second": median.steps / end,
                "staleness": statistics.fmean(median.staleness),
                "learning_rate": rate,
                "curve": median.curve,
            }
        )
    return rows


def one_slow(equal: Laboratory, most_seconds: float, slowness: float = 5.0) -> dict[str, float]:
    """Return steps a second of synchronous training by workers of which one is slow, with and without a backup."""
    problem = equal.problem
    helped = Laboratory(problem, synchronous=True, backup_workers=1)
    found = {}
    for name, laboratory, factor in (
        ("all equal", equal, 1.0),
        ("one slow", equal, slowness),
        ("one slow, one backup worker", helped, slowness),
    ):
        # With fewer slices each is larger, and takes longer in proportion.
        share = problem.workers / laboratory.plan.settings.num_slices

        def seconds(rng: random.Random, worker: int, share: float = share, factor: float = factor) -> float:
            return rng.uniform(0.9, 1.1) * share * (factor if worker == 0 else 1.0)

        run = laboratory.run(0, 0.1, 0, seconds=seconds, target=NEVER, most_seconds=most_seconds)
        found[name] = run.steps / run.curve[-1][0]
    return found


def figure(rows: Sequence[dict[str, Any]], target: float) -> str:
    """Return an SVG of accuracy against simulated time, a line for each bound."""
    width, height, left, bottom = 640, 320, 50, 40
    end = max(row["curve"][-1][0] for row in rows)
    lines = []
    for number, row in enumerate(rows):
        color = f"hsl({300 * number // len(rows)},70%,40%)"
        points = " ".join(
            f"{left + (width - left - 110) * time / end:.1f},{(height - bottom) * (1 - value):.1f}"
            for time, value in row["curve"]
        )
        lines.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{points}"/>')
        label = f"bound {row['bound']}: {row['seconds']:.0f} s"
        lines.append(f'<text x="{width - 105}" y="{20 + 16 * number}" fill="{color}">{label}</text>')
    level = (height - bottom) * (1 - target)
    axis = height - bottom
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<path d="M{left},0V{axis}H{width - 110}" fill="none" stroke="black"/>',
            f'<path d="M{left},{level:.1f}H{width - 110}" stroke="gray" stroke-dasharray="4"/>',
            f'<text x="4" y="{level + 4:.1f}">{target}</text><text x="4" y="{axis}">0</text>',
            f'<text x="{left}" y="{height - 20}">0</text><text x="{width - 160}" y="{height - 20}">{end:.0f} s</text>',
            f'<text x="{left + 120}" y="{height - 6}">held-out accuracy against simulated time</text>',
            *lines,
            "</svg>\n",
        ]
    )


def report(rows: Sequence[dict[str, Any]], speeds: dict[str, float]) -> str:
    """Return the tables."""
    first = rows[0]
    lines = ["bound  seconds to target  of bound 0  waiting  updates/s  mean staleness  learning rate"]
    lines += [
        f"{row['bound']:5}  {row['seconds']:17.0f}  {row['seconds'] / first['seconds']:10.2f}  {row['waiting']:7.1%}"
        f"  {row['steps_per_second']:9.2f}  {row['staleness']:14.1f}  {row['learning_rate']:13}"
        for row in rows
    ]
    lines += ["", "synchronous, one permanently slow worker      steps/s  of all equal"]
    lines += [f"{name:44}  {speed:7.3f}  {speed / speeds['all equal']:12.2f}" for name, speed in speeds.items()]
    return "\n".join(lines)


def comparisons(rows: Sequence[dict[str, Any]], speeds: dict[str, float], repeats: int) -> list[dict[str, Any]]:
    """Return the comparisons as rows of a benchmark."""
    first, last = rows[0], rows[-1]
    slow = speeds["one slow, one backup worker"]
    names = (
        (f"waiting share, bound {last['bound']} / bound 0", last["waiting"], first["waiting"], "share"),
        (f"time to target, bound {last['bound']} / bound 0", last["seconds"], first["seconds"], "simulated s"),
        ("one slow worker and a backup / all equal", slow, speeds["all equal"], "steps/simulated s"),
    )
    return [
        {
            "name": name,
            "ours": ours,
            "theirs": theirs,
            "ratio": ours / theirs,
            "unit": unit,
            "repeats": repeats,
            "versions": record.versions(),
        }
        for name, ours, theirs, unit in names
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--bounds", type=int, nargs="+", default=BOUNDS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated, of the part with a slow worker")
    parser.add_argument("--figure", type=pathlib.Path, help="write an SVG there")
    parser.add_argument("--json", action="store_true", help="one JSON object a line; the tables go to standard error")
    given = parser.parse_args(arguments)
    problem = Problem(workers=given.workers, width=given.width)
    laboratories = {synchronous: Laboratory(problem, synchronous=synchronous) for synchronous in (True, False)}
    rows = sweep(laboratories, given.bounds, given.rates, range(given.seeds), given.target)
    speeds = one_slow(laboratories[True], given.seconds)
    if given.figure:
        given.figure.write_text(figure(rows, given.target))
    if given.json:
        for row in comparisons(rows, speeds, given.seeds):
            print(json.dumps(row))
    print(report(rows, speeds), file=sys.stderr if given.json else sys.stdout)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

"""What jaxdist's training loop costs beside a bare hand-written one, and canonical beside mean reduction.

python benchmarks/overhead.py [--devices N] [--rounds N] [--only WORK ...] [--json]

Each side trains the same model with the same loss and optimizer on batches that are in device memory: those of
experiments/bytes_gpt.py and of digits_cnn.py, the latter with 256 examples a batch so that computing is the work, and
an MLP so small that dispatching it is the work. `cnn-64` is digits_cnn.py unchanged, for which no ratio is demanded.
Sides take turns in short rounds in one process, in a random order, because each side evicts the others' caches; a
round's ratio is that of neighbours in time, and the median over the rounds is shown. A single round is about 10 % off,
so fewer than a hundred rounds cannot resolve one percent.
`fit` runs with the hooks of `jaxdist train`: metrics to JSONL every 20 steps, a silent progress display, the accounts
of time, the recompile sentinel and the check whether to stop. The bare loop is what one would write by hand: a jitted
shard_map, donated state, nothing fetched but the loss every 20 steps. `packed` is the same with all gradients sent as
one vector, as `fit` does with small ones.

Memory is the peak resident memory of a process while it trains, each side in a process of its own. Compiling, which
needs more memory than these small models, is over by then.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist import adapters, make_mesh, optimizers, stop
from jaxdist.config import experiment as config
from jaxdist.config import loading
from jaxdist.guards import recompile
from jaxdist.launch import signals
from jaxdist.launch.joining import agreement
from jaxdist.models import mlp
from jaxdist.run import hooks, loop, progress_display, stopwatch
from jaxdist.rundir import writers
from jaxdist.spmd import state, step
from jaxdist.spmd.canonical import canonical_step

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
LOG_EVERY = 20
NUM_BATCHES = 8
ROUND_SECONDS = 0.4


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained, and the least part of the speed of bare / of bare, packed / of the mean that is demanded."""

    experiment: config.Experiment
    optimizer: optax.GradientTransformation
    demands: tuple[float | None, float | None, float]

    def batch(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Return a global batch of the experiment's own examples."""
        source = self.experiment.data.train
        examples = [source[int(id_)] for id_ in random.integers(0, len(source), self.experiment.global_batch_size)]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def make_work(name: str) -> Work:
    """Return the experiment of that name in experiments/, changed as the module's docstring says."""
    file, *demands = WORKS[name]
    sys.path.insert(0, str(EXPERIMENTS))
    experiment = loading.load_experiment(str(EXPERIMENTS / f"{file}.py"))
    if name == "mlp":
        small, adamw = mlp.MLP(num_classes=10, width=32), config.Optimizer(name="adamw", learning_rate=1e-3)
        experiment = dataclasses.replace(experiment, model=small, optimizer=adamw)
    if name == "cnn":
        experiment = dataclasses.replace(experiment, global_batch_size=256)
    batch_size = experiment.global_batch_size
    steps_per_epoch = len(experiment.data.train) // batch_size
    optimizer = optimizers.build(
        experiment.optimizer, global_batch_size=batch_size, steps_per_epoch=steps_per_epoch, max_steps=None
    )
    return Work(experiment, optimizer, tuple(demands))


WORKS = {
    "mlp": ("digits_mlp", 0.97, 0.9, 0.6),
    "cnn": ("digits_cnn", 0.99, 0.97, 0.95),
    "cnn-64": ("digits_cnn", None, None, 0.85),
    "gpt": ("bytes_gpt", 0.99, 0.97, 0.95),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A data position, as far as the loop looks at it."""

    epoch: int
    position: int
    num_examples: int


class Side:
    """One way to train a work: `run(num_steps)` trains so many steps more and waits for the last."""

    def __init__(self, work: Work, mesh: Mesh, folder: pathlib.Path):
        random = np.random.default_rng(0)
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        self.work, self.mesh, self.folder = work, mesh, folder
        self.batches = [jax.device_put(self.host_batch(random), sharding) for _ in range(NUM_BATCHES)]

    def host_batch(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one batch as the side wants it."""
        return self.work.batch(random)

    def run(self, num_steps: int) -> None:
        """Train so many steps more and wait for the last."""
        raise NotImplementedError


class Bare(Side):
    """The loop of an experienced user."""

    def __init__(self, work: Work, mesh: Mesh, folder: pathlib.Path):
        super().__init__(work, mesh, folder)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.step = self.make_step()
        self.state = jax.jit(self.init, out_shardings=replicated)(jax.random.key(0))
        self.count, self.losses = 0, []

    def init(self, key: jax.Array) -> Any:
        """Return params, optimizer state and the number of steps made."""
        experiment = self.work.experiment
        example = jnp.asarray(self.host_batch(np.random.default_rng(0))[experiment.inputs][:1])
        params = experiment.model.init(key, example, train=False)["params"]
        return params, self.work.optimizer.init(params), jnp.int32(0)

    def make_step(self) -> Callable[..., Any]:
        """Return the step a competent user writes."""
        experiment, optimizer = self.work.experiment, self.work.optimizer

        def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            inputs = batch[experiment.inputs]
            outputs = experiment.model.apply({"params": params}, inputs, train=True, rngs={"dropout": key})
            values, metrics = experiment.loss(outputs, batch)
            return values.mean(), {name: each.mean() for name, each in metrics.items()}

        def local_step(train_state: Any, batch: Any) -> Any:
            params, opt_state, count = train_state
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), count), jax.lax.axis_index("data"))
            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
            grads, metrics = self.average((grads, {"loss": loss, **metrics}))
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, count + 1), metrics

        specs = (PartitionSpec(), PartitionSpec("data"))
        mapped = jax.shard_map(local_step, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        return jax.jit(mapped, donate_argnums=0)

    def average(self, tree: Any) -> Any:
        """Return the mean over the devices."""
        return jax.lax.pmean(tree, "data")

    def run(self, num_steps: int) -> None:
        """See Side."""
        for batch in itertools.islice(itertools.cycle(self.batches), num_steps):
            self.state, metrics = self.step(self.state, batch)
            self.count += 1
            if self.count % LOG_EVERY == 0:
                self.losses.append(float(metrics["loss"]))
        jax.block_until_ready(self.state)


class Packed(Bare):
    """The same, with all gradients in one vector, since each leaf costs a collective."""

    def average(self, tree: Any) -> Any:
        """Return the mean over the devices."""
        vector, unravel = ravel_pytree(tree)
        return unravel(jax.lax.pmean(vector, "data"))


class Books:
    """What the hooks need of the Bookkeeper of `jaxdist train`."""

    def __init__(self, writer: writers.JsonlWriter):
        self.writer, self.display = writer, progress_display.Silent()

    def logs(self, step: int) -> bool:
        """Return whether the metrics of `step` are written."""
        return step == 1 or step % LOG_EVERY == 0

    def log(self, step: int, metrics: dict[str, float], stamped: Mapping[str, float]) -> None:
        """Write them."""
        self.writer.write(step, {**stamped, **{f"train/{name}": value for name, value in metrics.items()}})


class Fit(Side):
    """jaxdist's loop, with the hooks that `jaxdist train` gives it."""

    def __init__(self, work: Work, mesh: Mesh, folder: pathlib.Path):
        super().__init__(work, mesh, folder)
        experiment = work.experiment
        functions = adapters.from_model(experiment.model, experiment.loss, self.batches[0], inputs=experiment.inputs)
        self.step = self.make_step(functions.loss_fn)
        self.state = state.create_state(functions.init_fn, work.optimizer, mesh=mesh, seed=0)
        self.progress = stop.Progress()
        file = folder / f"{type(self).__name__}-{id(self)}.jsonl"
        self.books: Any = Books(writers.JsonlWriter(file))
        self.log = hooks.LogMetrics(self.books)
        self.sentinel = recompile.RecompileSentinel()

    def host_batch(self, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Add the mask."""
        # The loader gives every batch its mask.
        batch = super().host_batch(random)
        return batch | {"mask": np.ones(self.work.experiment.global_batch_size, np.float32)}

    def make_step(self, loss_fn: Callable[..., Any]) -> step.Step:
        """Return the step with mean reduction."""
        return step.data_parallel_step(loss_fn, self.work.optimizer, self.mesh)

    def watched_step(self, train_state: state.TrainState, batch: Any) -> Any:
        """Step as `jaxdist train` does."""
        outputs = self.step(train_state, batch)
        self.sentinel.observe(self.step, (train_state, batch))
        return outputs

    def positioned(self) -> Iterator[tuple[Any, Place]]:
        """Yield batches with positions, forever."""
        for number, batch in enumerate(itertools.cycle(self.batches)):
            yield batch, Place(0, number, 1 << 40)

    def run(self, num_steps: int) -> None:
        """See Side."""
        rule = stop.Stop(max_steps=self.progress.step + num_steps, max_seconds=1e9, target=2.0).rule()
        with signals.stop_on_signal() as request:
            result = loop.fit(
                self.watched_step,
                self.state,
                self.positioned(),
                stop=rule,
                hooks=[self.log, hooks.show_progress(self.books)],
                progress=self.progress,
                stop_requested=agreement.Alone().stop(lambda step: bool(request)),
                stopwatch=stopwatch.Stopwatch(),
                step_times=stopwatch.StepTimes(),
            )
        assert result.end_reason == "max_steps", result.end_reason
        self.state = result.state


class Canonical(Fit):
    """The same with canonical reduction, the batch divided into the default number of logical shards."""

    def make_step(self, loss_fn: Callable[..., Any]) -> step.Step:
        """Return the step with canonical reduction."""
        return canonical_step.canonical_step(loss_fn, self.work.optimizer, self.mesh)


SIDES = {"bare": Bare, "packed": Packed, "fit": Fit, "canonical": Canonical}


def seconds(side: Side, num_steps: int) -> float:
    start = time.perf_counter()
    side.run(num_steps)
    return time.perf_counter() - start


def steps_per_round(side: Side) -> int:
    """Return the steps that fill a round; the side is compiled and warm afterwards."""
    side.run(2 * LOG_EVERY)
    each = min(seconds(side, LOG_EVERY) for _ in range(3)) / LOG_EVERY
    return max(1, round(ROUND_SECONDS / each))


def take_turns(sides: dict[str, Side], num_rounds: int) -> dict[str, list[float]]:
    """Return each side's steps per second in each round."""
    num_steps = max(steps_per_round(side) for side in sides.values())
    rates: dict[str, list[float]] = {name: [] for name in sides}
    names, order = list(sides), random.Random(0)
    gc.collect()
    gc.disable()
    for _ in range(num_rounds):
        order.shuffle(names)
        for name in names:
            rates[name].append(num_steps / seconds(sides[name], num_steps))
        gc.collect()
    gc.enable()
    return rates


def compare(name: str, ours: list[float], theirs: list[float], unit: str, least: float | None) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "name": name,
        "ours": round(statistics.median(ours), 2),
        "theirs": round(statistics.median(theirs), 2),
        "ratio": round(statistics.median(ratios), 4),
        "unit": unit,
        "repeats": len(ratios),
        "least": least,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    packages = {"jax": jax, "flax": flax, "optax": optax}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in packages.items()}


def measure_work(name: str, mesh: Mesh, num_rounds: int) -> list[dict[str, Any]]:
    work = make_work(name)
    with tempfile.TemporaryDirectory() as folder:
        sides = {kind: make(work, mesh, pathlib.Path(folder)) for kind, make in SIDES.items()}
        rates = take_turns(sides, num_rounds)
    bare, packed, mean = work.demands
    return [
        compare(f"{name}: fit / bare loop", rates["fit"], rates["bare"], "steps/s", bare),
        compare(f"{name}: fit / bare, packed", rates["fit"], rates["packed"], "steps/s", packed),
        compare(f"{name}: canonical / mean", rates["canonical"], rates["fit"], "steps/s", mean),
    ]


def measure_memory(name: str, num_devices: int) -> list[dict[str, Any]]:
    """Return the sides' resident memory, each measured in a process of its own."""
    peaks = {}
    for kind in SIDES:
        command = [sys.executable, __file__, "--devices", str(num_devices), "--memory-of", name, kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[kind] = float(done.stdout.splitlines()[-1])
    return [
        compare(f"{name}: fit / bare loop, memory", [peaks["fit"]], [peaks["bare"]], "MiB", None),
        compare(f"{name}: canonical / mean, memory", [peaks["canonical"]], [peaks["fit"]], "MiB", None),
    ]


def print_memory(name: str, kind: str, mesh: Mesh) -> None:
    with tempfile.TemporaryDirectory() as folder:
        side = SIDES[kind](make_work(name), mesh, pathlib.Path(folder))
        side.run(LOG_EVERY)
        gc.collect()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        side.run(5 * LOG_EVERY)
        status = pathlib.Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({key: value for key, value in row.items() if key != "least"}), flush=True)
        return
    wanted = (
        ""
        if row["least"] is None
        else f"at least {row['least']}" + (" " if row["ratio"] >= row["least"] else "  MISSED")
    )
    print(
        f"{row['name']:<34} {row['ours']:>10} {row['theirs']:>10}  {row['unit']:<8} {row['ratio']:>7}  {wanted}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="fake CPU devices")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    os.environ.setdefault("NPROC", str(max(2, len(os.sched_getaffinity(0)))))
    mesh = make_mesh(devices=jax.devices()[: options.devices])
    if options.memory_of:
        print_memory(*options.memory_of, mesh)
        return
    if not options.json:
        print(f"{options.devices} devices, {options.rounds} rounds; {versions()}")
        print(f"{'':<34} {'ours':>10} {'theirs':>10}  {'unit':<8} {'ratio':>7}")
    for name in options.only:
        for row in measure_work(name, mesh, options.rounds):
            show(row, options.json)
        for row in [] if options.no_memory else measure_memory(name, options.devices):
            show(row, options.json)


if __name__ == "__main__":
    main()

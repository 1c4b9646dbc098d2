"""`jaxdist plan` against what happens: bytes, collectives, the memory of a process, the time of a step.

python benchmarks/plan_truth.py [--json] [--only bytes|memory|time]

- bytes: 30 models x layouts on 8 fake devices. "ours" is the plan, made from shapes alone; "theirs" is the program that
  JAX compiled for the arrays that training starts from. Bytes sent are compared with the formulas of a ring.
- memory: "theirs" is how far the resident memory of a process rose in a step above what it held before, and the
  arguments, on one device.
- time: three rates (arithmetic, memory traffic, a fixed cost) are fitted to the calibration models; "ours" is what they
  give for models that were not among them, "theirs" the CPU seconds that a step took. Models take turns, and the median
  of the turns counts, since other programs may share the machine.
"""

import argparse
import ctypes
import dataclasses
import gc
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

import jaxdist
from jaxdist import losses
from jaxdist.launch.joining import runtime
from jaxdist.models import cnn, gpt, mlp, resnet, vit
from jaxdist.plan import chips, estimate, topology
from jaxdist.run import components
from jaxdist.run.diagnosis import flops

NUM_DEVICES, TURNS = 8, 7
LAYOUTS = ("data-parallel", "zero1", "fsdp")
LIMITS = {"bytes": 0.02, "sent": 0.05, "memory": 0.10, "time": 0.08}
NO_CHIP = chips.Chip("cpu", None, 1.0, 1.0, 1.0, 1, "units")

Model = tuple[str, Callable[[], jaxdist.Experiment]]


def experiment(model: Any, fields: dict[str, np.ndarray], batch: int, loss: Any, inputs: str) -> jaxdist.Experiment:
    return jaxdist.Experiment(
        model=model,
        loss=loss,
        inputs=inputs,
        data=jaxdist.Data(train=jaxdist.ArraySource(fields), num_threads=0),
        optimizer=jaxdist.Optimizer(name="adam", learning_rate=1e-3),
        global_batch_size=batch,
        stop=jaxdist.Stop(max_steps=1),
        layout=jaxdist.LayoutSettings(min_size=2),
    )


def dense(width: int, layers: int, batch: int, features: int = 64) -> Model:
    fields = {"image": np.ones((batch, features), np.float32), "label": np.zeros(batch, np.int32)}
    model = mlp.MLP(num_classes=8, width=width, num_layers=layers, dropout_rate=0.0)
    return f"mlp {width}x{layers}, batch {batch}", lambda: experiment(
        model, fields, batch, losses.classification, "image"
    )


def images(model: Any, name: str, side: int, batch: int, channels: int = 3) -> Model:
    fields = {"image": np.ones((batch, side, side, channels), np.float32), "label": np.zeros(batch, np.int32)}
    return f"{name}, batch {batch}", lambda: experiment(model, fields, batch, losses.classification, "image")


def text(width: int, layers: int, length: int, batch: int) -> Model:
    fields = {"tokens": np.zeros((batch, length), np.int32)}
    model = gpt.GPT(64, length, num_layers=layers, num_heads=4, width=width)
    name = f"gpt {width}x{layers}x{length}, batch {batch}"
    return name, lambda: experiment(model, fields, batch, losses.next_token, "tokens")


def small_vit(width: int, layers: int) -> Any:
    return vit.ViT(8, 4, num_layers=layers, num_heads=4, width=width)


MODELS = (
    dense(64, 1, 32),
    dense(128, 3, 16),
    dense(256, 2, 64),
    images(cnn.CNN(num_classes=8), "cnn", 16, 16),
    images(small_vit(32, 1), "vit 32x1", 16, 16),
    images(small_vit(64, 2), "vit 64x2", 16, 16),
    text(32, 1, 32, 16),
    text(64, 2, 16, 16),
    text(64, 1, 64, 8),
    images(resnet.ResNet(8, (1, 1), "basic"), "resnet", 16, 16),
)

CALIBRATION = (
    dense(256, 1, 128, 256), dense(512, 3, 256, 512), dense(1024, 2, 128, 256), dense(128, 6, 512, 128),
    text(64, 2, 64, 8), text(128, 2, 128, 8), text(64, 4, 128, 4),
    images(small_vit(64, 2), "vit 64x2", 32, 16), images(small_vit(128, 3), "vit 128x3", 32, 8),
)  # fmt: skip
UNSEEN = (
    dense(384, 2, 192, 256), dense(768, 4, 128, 384), dense(1536, 1, 96, 512), dense(192, 5, 384, 192),
    text(96, 3, 64, 8), text(128, 3, 64, 8), text(64, 3, 128, 8),
    images(small_vit(96, 2), "vit 96x2", 32, 16), images(small_vit(64, 4), "vit 64x4", 32, 8),
)  # fmt: skip
MEMORY = (dense(1024, 4, 8192, 256), text(128, 2, 256, 32), images(small_vit(128, 2), "vit 128x2", 32, 256))


def planned(each: jaxdist.Experiment, devices: Sequence[jax.Device]) -> estimate.Estimate:
    where = topology.Topology(f"cpu:{len(devices)}", devices, NO_CHIP, runs_here=True)
    return estimate.estimate(each, where)


def program_of(parts: components.Parts) -> Any:
    """Return the compiled step of the arrays that training starts from."""
    state, (batch, _) = parts.create_state(), next(iter(parts.batches()))
    step: Any = parts.step
    return step.trace(state, batch).lower().compile()


def bytes_rows() -> Iterator[dict[str, Any]]:
    for (name, make), layout in itertools.product(MODELS, LAYOUTS):
        each = dataclasses.replace(make(), strategy=layout)
        made = planned(each, jax.devices()[:NUM_DEVICES])
        memory = program_of(components.put_together(each, devices=jax.devices()[:NUM_DEVICES])).memory_analysis()
        theirs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        theirs += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        yield row(f"bytes/{name}, {layout}", made.bytes.total, theirs, "bytes per device")
        sent = sum(number for _, number in made.collectives.values())
        yield row(f"sent/{name}, {layout}", sent, ring(made, layout), "bytes sent per device and step")
        gc.collect()


def ring(made: estimate.Estimate, layout: str) -> float:
    """Return what each device sends by the formula: the gradients reduced, and the params gathered where sharded.

    The compiler for CPUs merges the two gathers of fsdp, which accelerators keep apart; see `communication.py`.
    """
    passes = {"data-parallel": 2, "zero1": 2, "fsdp": 2}[layout]
    return passes * 4 * made.num_params * (NUM_DEVICES - 1) / NUM_DEVICES


def memory_rows() -> Iterator[dict[str, Any]]:
    """Measure each model in a process of its own: memory that another gave back would hide what a step takes."""
    for number in range(len(MEMORY)):
        command = [sys.executable, __file__, "--memory-of", str(number)]
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        # Memory that is freed goes back at once, so that taking it again is seen.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        shown = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        yield json.loads(shown.splitlines()[-1])


def memory_row(number: int) -> dict[str, Any]:
    name, make = MEMORY[number]
    each, devices = make(), jax.devices()[:1]
    made = planned(each, devices)
    parts = components.put_together(each, devices=devices)
    state, (batch, _) = parts.create_state(), next(iter(parts.batches()))
    state, _ = jax.block_until_ready(parts.step(state, batch))  # compiles, which takes more memory than the step
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    held = made.bytes.params + made.bytes.opt_state + made.bytes.batch
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    before = _resident("VmRSS")
    jax.block_until_ready(parts.step(state, batch))
    return row(f"memory/{name}", made.bytes.total, held + _resident("VmHWM") - before, "bytes of the process")


def _resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Timed:
    """A step that is ready to run on one device, and what it needs."""

    def __init__(self, model: Model):
        self.name, make = model
        parts = components.put_together(make(), devices=jax.devices()[:1])
        self._state, (self._batch, _) = parts.create_state(), next(iter(parts.batches()))
        step: Any = parts.step
        traced = step.trace(self._state, self._batch)
        costs = traced.lower().compile().cost_analysis()
        self.features = (flops.count(traced.jaxpr), costs["bytes accessed"], 1.0)
        self._step = parts.step
        self.seconds: list[float] = []

    def turn(self) -> None:
        """Take steps for some tenths of a second and note the CPU seconds of one."""
        self._run(1)
        start = time.process_time()
        self._run(count := 4)
        self.seconds.append((time.process_time() - start) / count)

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)

    @property
    def median(self) -> float:
        """The CPU seconds of a step, the median of all turns."""
        return statistics.median(self.seconds)


def fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return rates, none negative, with which the sum over features has the least relative errors.

    Least squares by multiplicative updates (Lee and Seung, 2001), which keep what is positive positive.
    """
    scaled = features / seconds[:, None]
    size = scaled.max(axis=0)
    matrix, rates = scaled / size, np.ones(features.shape[1])
    target = matrix.T @ np.ones(len(seconds))
    for _ in range(20_000):
        rates *= target / (matrix.T @ (matrix @ rates))
    return rates / size


def time_rows() -> list[dict[str, Any]]:
    steps = [Timed(model) for model in (*CALIBRATION, *UNSEEN)]
    for _ in range(TURNS):
        for step in steps:
            step.turn()
    known, unseen = steps[: len(CALIBRATION)], steps[len(CALIBRATION) :]
    rates = fit(np.array([step.features for step in known]), np.array([step.median for step in known]))
    return [
        row(f"time/{step.name}", float(rates @ step.features), step.median, "CPU seconds a step", TURNS)
        for step in unseen
    ]


def row(name: str, ours: float, theirs: float, unit: str, repeats: int = 1) -> dict[str, Any]:
    versions = {"jax": jax.__version__}
    values = {"ours": ours, "theirs": theirs, "ratio": ours / theirs}
    return {"name": name, **values, "unit": unit, "repeats": repeats, "versions": versions}


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each claim: the error, its limit, and whether it was met. Time is judged by the median."""
    lines = []
    for claim, limit in LIMITS.items():
        errors = [abs(each["ratio"] - 1) for each in rows if each["name"].startswith(f"{claim}/")]
        if errors:
            worst = statistics.median(errors) if claim == "time" else max(errors)
            kind = "median" if claim == "time" else "largest"
            met = "met" if worst <= limit else "MISSED"
            lines.append(f"{claim}: {kind} error {worst:.2%} of {len(errors)} (limit {limit:.0%}): {met}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=("bytes", "memory", "time"))
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of is not None:
        print(json.dumps(memory_row(options.memory_of)))
        return
    runtime.use_compilation_cache()
    parts: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "bytes": bytes_rows,
        "memory": memory_rows,
        "time": time_rows,
    }
    rows = []
    for each in (each for name, make in parts.items() if options.only in (None, name) for each in make()):
        rows.append(each)
        shown = (
            f"{each['name']:<46} {each['ours']:>14.6g} {each['theirs']:>14.6g} {each['ratio']:>7.3f}  {each['unit']}"
        )
        print(json.dumps(each) if options.json else shown, flush=True)
    print("\n".join(summary(rows)), file=sys.stderr if options.json else sys.stdout)


if __name__ == "__main__":
    main()

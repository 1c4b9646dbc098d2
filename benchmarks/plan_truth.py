"""`jaxdist plan` against what happens: bytes, collectives, the memory of a process, the time of a step.

python benchmarks/plan_truth.py --only bytes|memory|time [--log FILE] [--json]

- bytes: 30 models x layouts on 8 fake devices. "ours" is the plan, made from shapes alone; "theirs" is the program that
  JAX compiled for the arrays that training starts from. Bytes sent are compared with the formulas of a ring.
- memory: "theirs" is how far the resident memory of a process rose in a step above what it held before, and the
  arguments, on one device.
- time: "ours" is what `jaxdist plan --calibrate` says, from rates that were fitted to other models; "theirs" is the
  time of a step in a process of its own, the median of nine turns of about a tenth of a second. A shared machine
  changes its pace for minutes: two fixed programs are timed beside the calibration and beside each model, and a model
  is left for the next call where they differ by more than 15 %.

Rows are printed as they come. With --log, what was measured before is not measured again: it may be run in pieces.
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxdist
from jaxdist import losses
from jaxdist.launch.joining import runtime
from jaxdist.models import cnn, gpt, mlp, resnet, vit
from jaxdist.plan import chips, estimate, topology
from jaxdist.plan.calibrated import measuring
from jaxdist.run import components

NUM_DEVICES, TURNS = 8, 9
PACE_LIMIT = 0.15
LAYOUTS = ("data-parallel", "zero1", "fsdp")
LIMITS = {"bytes": 0.02, "sent": 0.05, "memory": 0.10, "time": 0.08}
NO_CHIP = chips.Chip("cpu", None, 1.0, 1.0, 1.0, 1, "units")

Row = dict[str, Any]
Known = Mapping[str, Row]
"""Rows that were measured before, by name."""
Pending = tuple[str, Callable[[], Iterator[Row]]]
"""The name of a row, and what measures it."""
Model = tuple[str, Callable[[], jaxdist.Experiment]]


def experiment(model: Any, fields: dict[str, np.ndarray], batch: int, loss: Any, inputs: str) -> jaxdist.Experiment:
    return jaxdist.Experiment(
        model=model,
        loss=loss,
        inputs=inputs,
        data=jaxdist.Data(train=jaxdist.ArraySource(fields), num_threads=0),
        optimizer=jaxdist.Optimizer(name="adam", learning_rate=1e-5),
        global_batch_size=batch,
        stop=jaxdist.Stop(max_steps=1),
        layout=jaxdist.LayoutSettings(min_size=2),
    )


def noise(*shape: int) -> np.ndarray:
    """Return random values: with equal ones gradients would vanish, and denormal numbers are slow to compute with."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def labels(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32) % 8


def dense(width: int, layers: int, batch: int, features: int = 64) -> Model:
    fields = {"image": noise(batch, features), "label": labels(batch)}
    model = mlp.MLP(num_classes=8, width=width, num_layers=layers, dropout_rate=0.0)
    return f"mlp {width}x{layers}, batch {batch}", lambda: experiment(
        model, fields, batch, losses.classification, "image"
    )


def images(model: Any, name: str, side: int, batch: int, channels: int = 3) -> Model:
    fields = {"image": noise(batch, side, side, channels), "label": labels(batch)}
    return f"{name}, batch {batch}", lambda: experiment(model, fields, batch, losses.classification, "image")


def text(width: int, layers: int, length: int, batch: int) -> Model:
    fields = {"tokens": np.random.default_rng(0).integers(0, 64, (batch, length), np.int32)}
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

UNSEEN = (
    dense(320, 3, 160, 128), dense(1024, 2, 64, 512), dense(512, 3, 256), dense(2048, 1, 48, 256),
    text(96, 2, 96, 12), text(160, 2, 48, 8), text(128, 1, 192, 4),
    images(small_vit(128, 1), "vit 128x1", 32, 8), images(small_vit(48, 3), "vit 48x3", 16, 32),
    images(cnn.CNN(num_classes=8, width=16), "cnn 16", 20, 32),
    images(cnn.CNN(num_classes=8, width=32), "cnn 32", 16, 64),
    images(resnet.ResNet(8, (2, 1), "basic"), "resnet 2-1", 16, 12),
)  # fmt: skip
"""Models that `jaxdist plan --calibrate` does not measure, and whose errors had no part in choosing its terms."""
MEMORY = (dense(1024, 4, 8192, 256), text(128, 2, 256, 32), images(small_vit(128, 2), "vit 128x2", 32, 256))


def planned(each: jaxdist.Experiment, devices: Sequence[jax.Device]) -> estimate.Estimate:
    where = topology.Topology(f"cpu:{len(devices)}", devices, NO_CHIP, runs_here=True)
    return estimate.estimate(each, where)


def program_of(parts: components.Parts) -> Any:
    """Return the compiled step of the arrays that training starts from."""
    state, (batch, _) = parts.create_state(), next(iter(parts.batches()))
    step: Any = parts.step
    return step.trace(state, batch).lower().compile()


def bytes_rows(known: Known) -> Iterator[Pending]:
    yield from ((name, lambda: iter(())) for name in known if name.startswith("sent/"))
    for (name, make), layout in itertools.product(MODELS, LAYOUTS):
        yield f"bytes/{name}, {layout}", functools.partial(bytes_row, f"{name}, {layout}", make, layout)


def bytes_row(name: str, make: Callable[[], jaxdist.Experiment], layout: str) -> Iterator[Row]:
    """Yield what is sent, then what is held: a row of bytes in a log says that both are there."""
    each = dataclasses.replace(make(), strategy=layout)
    made = planned(each, jax.devices()[:NUM_DEVICES])
    memory = program_of(components.put_together(each, devices=jax.devices()[:NUM_DEVICES])).memory_analysis()
    theirs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    theirs += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    sent = sum(number for _, number in made.collectives.values())
    yield row(f"sent/{name}", sent, ring(made, layout), "bytes sent per device and step")
    yield row(f"bytes/{name}", made.bytes.total, theirs, "bytes per device")


def ring(made: estimate.Estimate, layout: str) -> float:
    """Return what each device sends by the formula: the gradients reduced, and the params gathered where sharded.

    The compiler for CPUs merges the two gathers of fsdp, which accelerators keep apart; see `communication.py`.
    """
    passes = {"data-parallel": 2, "zero1": 2, "fsdp": 2}[layout]
    return passes * 4 * made.num_params * (NUM_DEVICES - 1) / NUM_DEVICES


def memory_rows(_: Known) -> Iterator[Pending]:
    for number, (name, _) in enumerate(MEMORY):
        # Memory that is freed goes back at once, so that taking it again is seen.
        yield f"memory/{name}", functools.partial(measured_apart, "memory", number, MALLOC_MMAP_THRESHOLD_="65536")


def measured_apart(part: str, number: int, **environment: str) -> Iterator[Row]:
    """Measure a model in a process of its own: memory that another gave back would change what a step takes."""
    command = [sys.executable, __file__, "--only", part, "--number", str(number)]
    there = {**os.environ, **environment}
    yield json.loads(subprocess.run(command, env=there, check=True, stdout=subprocess.PIPE, text=True).stdout)


def memory_row(number: int) -> Row:
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


def time_rows(known: Known) -> Iterator[Pending]:
    """Predict as `jaxdist plan --calibrate` does, and measure each model at the pace that the calibration saw."""
    calibrated_here()
    pace = known.get("pace") or row("pace", *anchors(), "seconds of two fixed programs")

    def measure(number: int) -> Iterator[Row]:
        for each in measured_apart("time", number):
            square, large = each.pop("pace")
            apart = max(abs(square / pace["ours"] - 1), abs(large / pace["theirs"] - 1))
            if apart <= PACE_LIMIT:
                yield each
            else:
                print(f"{each['name']}: the machine's pace changed by {apart:.0%}; not counted", file=sys.stderr)

    yield "pace", lambda: iter([pace])
    for number, (name, _) in enumerate(UNSEEN):
        yield f"time/{name}", functools.partial(measure, number)


def calibrated_here() -> topology.Topology:
    return topology.calibrated(topology.find("cpu:1"), show=lambda *what: print(*what, file=sys.stderr))


def time_row(number: int) -> Row:
    name, make = UNSEEN[number]
    where = calibrated_here()
    step = measuring.RunningStep(make(), where.devices)
    before = anchors()
    for _ in range(TURNS):
        step.turn()
    pace = [statistics.mean(both) for both in zip(before, anchors(), strict=True)]
    predicted = estimate.estimate(make(), where).step_seconds
    made = row(f"time/{name}", predicted, step.measured().step_seconds, "seconds a step", TURNS)
    return made | {"pace": pace}


def anchors() -> tuple[float, float]:
    """Return the seconds of two programs that are always the same: a matrix product, and a sum of large arrays."""
    square, large = np.ones((768, 768), np.float32), np.ones(1 << 22, np.float32)
    return median_seconds(jax.jit(lambda x: x @ x), square), median_seconds(jax.jit(lambda x: 2 * x + 1), large)


def median_seconds(program: Callable[..., Any], argument: np.ndarray) -> float:
    held, seconds = jax.device_put(argument), []
    for _ in range(40):
        start = time.perf_counter()
        program(held).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def row(name: str, ours: float, theirs: float, unit: str, repeats: int = 1) -> Row:
    versions = {"jax": jax.__version__}
    values = {"ours": ours, "theirs": theirs, "ratio": ours / theirs}
    return {"name": name, **values, "unit": unit, "repeats": repeats, "versions": versions}


def summary(rows: Sequence[Row]) -> list[str]:
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


PARTS: dict[str, tuple[int, Callable[[Known], Iterator[Pending]]]] = {
    "bytes": (NUM_DEVICES, bytes_rows),
    "memory": (1, memory_rows),
    "time": (1, time_rows),
}
"""Number of fake devices that a part needs, and its rows."""


def rows_of(part: str, known: Known) -> Iterator[Row]:
    """Yield the rows of a part, those in the log from there, the others as they are measured."""
    num_devices, make = PARTS[part]
    runtime.start_by_itself(num_devices)
    for name, measure in make(known):
        yield from [known[name]] if name in known else measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=PARTS, required=True)
    parser.add_argument("--log", type=pathlib.Path, help="keep rows here, and measure only those that are not in it")
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.number is not None:
        runtime.start_by_itself(1)
        print(json.dumps({"memory": memory_row, "time": time_row}[options.only](options.number)))
        return
    log = options.log
    lines = log.read_text().splitlines() if log and log.exists() else []
    known = {each["name"]: each for each in map(json.loads, lines)}
    rows = []
    for each in rows_of(options.only, known):
        rows.append(each)
        print(json.dumps(each) if options.json else line(each), flush=True)
        if log and each["name"] not in known:
            with log.open("a") as file:
                file.write(f"{json.dumps(each)}\n")
    print("\n".join(summary(rows)), file=sys.stderr if options.json else sys.stdout)


def line(each: Row) -> str:
    """Return a row for people."""
    return f"{each['name']:<46} {each['ours']:>14.6g} {each['theirs']:>14.6g} {each['ratio']:>7.3f}  {each['unit']}"


if __name__ == "__main__":
    main()

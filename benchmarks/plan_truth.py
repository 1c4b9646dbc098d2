"""`jaxdist plan` against what happens: bytes, collectives, the memory of a process, the time of a step.

python benchmarks/plan_truth.py --only bytes|memory|time [--log FILE] [--json]

- bytes: 30 models x layouts on 8 fake devices. "ours" is the plan, made from shapes alone; "theirs" is the program that
  JAX compiled for the arrays that training starts from. Bytes sent are compared with the formulas of a ring.
- memory: "theirs" is how far the resident memory of a process rose in a step above what it held before, and the
  arguments, on one device.
- time: "ours" is what `jaxdist plan --calibrate` says, from rates that were fitted to other models, at the pace of the
  moment; "theirs" is the time of a step in a process of its own, the median of nine turns of about a tenth of a
  second. A shared machine changes its pace by 20 to 40 % within a minute: five of the programs of the calibration take
  turns with the model, and `pace` is the median of how many times as long they take as when it was calibrated.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from plan_models import MEMORY, MODELS, UNSEEN

import jaxdist
from jaxdist.launch.joining import runtime
from jaxdist.plan import chips, estimate, topology
from jaxdist.plan.calibrated import measuring, programs
from jaxdist.run import components

NUM_DEVICES, TURNS = 8, 9
ANCHORS = ("mlp 512x3,", "mlp 128x6,", "gpt 64x2x64,", "vit 128x1,", "cnn 32,")
"""Programs of the calibration that show the machine's pace."""
LAYOUTS = ("data-parallel", "zero1", "fsdp")
LIMITS = {"bytes": 0.02, "sent": 0.05, "memory": 0.10, "time": 0.08}
NO_CHIP = chips.Chip("cpu", None, 1.0, 1.0, 1.0, 1, "units")

Row = dict[str, Any]
Known = Mapping[str, Row]
"""Rows that were measured before, by name."""
Pending = tuple[str, Callable[[], Iterator[Row]]]
"""The name of a row, and what measures it."""


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


def time_rows(_: Known) -> Iterator[Pending]:
    """Predict as `jaxdist plan --calibrate` does; the calibration is made first where there is none."""
    calibrated_here()
    for number, (name, _) in enumerate(UNSEEN):
        yield f"time/{name}", functools.partial(measured_apart, "time", number)


def calibrated_here() -> topology.Topology:
    return topology.calibrated(topology.find("cpu:1"), show=lambda *what: print(*what, file=sys.stderr))


def time_row(number: int) -> Row:
    name, make = UNSEEN[number]
    where = calibrated_here()
    made = where.calibration
    assert made is not None
    anchors = [each for each in programs.experiments(1) if each.name.startswith(ANCHORS)]
    model, *others = (measuring.RunningStep(each, where.devices) for each in (make(), *anchors))
    for _ in range(TURNS):
        for step in (model, *others):
            step.turn()
    usual = [made.programs[each.name] for each in others]
    paces = measuring.paces(usual, [each.seconds for each in others])
    predicted = estimate.estimate(make(), where).step_seconds
    taken = model.measured(paces).step_seconds
    return row(f"time/{name}", predicted, taken, "seconds a step", TURNS) | {"pace": statistics.median(paces)}


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

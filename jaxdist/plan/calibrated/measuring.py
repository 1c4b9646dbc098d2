"""Runs training steps on the devices that are here, and times each operation of theirs with JAX's profiler."""

import collections
import gzip
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax

from jaxdist.config.experiment import Experiment
from jaxdist.errors import UserError
from jaxdist.plan.calibrated.operation_rates import MeasuredProgram
from jaxdist.plan.compiled.operations import operations
from jaxdist.run import components

_TURNS, _TURN_SECONDS = 7, 0.1
_TRACED_TURNS, _TRACED_STEPS = (1, 3, 5), 4


class RunningStep:
    """A training step that is compiled and takes steps when told to.

    Attributes:
      name: of its experiment.
      seconds: of a step, in each turn.
    """

    def __init__(self, experiment: Experiment, devices: Sequence[jax.Device]):
        self.name = experiment.name
        parts = components.put_together(experiment, devices=devices)
        self._state, (self._batch, _) = parts.create_state(), next(iter(parts.batches()))
        self._step = cast("Any", parts.step)
        compiled = self._step.trace(self._state, self._batch).lower().compile()
        self._hlo: str = compiled.as_text()
        memory: Any = compiled.memory_analysis()
        self._temp_bytes: int = memory.temp_size_in_bytes
        self._held_bytes: int = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.seconds: list[float] = []
        self._traces: dict[int, bytes] = {}
        self.run(2)

    def run(self, count: int) -> float:
        """Take steps one after the other and return the seconds of one."""
        start = time.perf_counter()
        for _ in range(count):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / count

    def turn(self, *, traced: bool = False) -> None:
        """Take steps for about a tenth of a second and note the time of one; `traced`: then some under the profiler."""
        seconds = self.run(1)
        self.seconds.append(self.run(max(int(_TURN_SECONDS / seconds), 2)))
        if traced:
            self._traces[len(self.seconds) - 1] = trace(lambda: self.run(_TRACED_STEPS))

    def measured(self, paces: Sequence[float]) -> MeasuredProgram:
        """Return the medians of all turns, as they would have been had the machine kept its pace: see `paces`.

        Raises:
          UserError: the profiler of this version of JAX does not name operations.
        """
        step = statistics.median(each / pace for each, pace in zip(self.seconds, paces, strict=True))
        seconds = operation_seconds({each: self.seconds[turn] / step for turn, each in self._traces.items()})
        found = [each for each in operations(self._hlo) if each.name in seconds]
        if self._traces and not found:
            raise UserError(
                "Calibrating needs JAX's profiler, and its trace names no operation of the program that ran. "
                "Leave --calibrate out: the bounds need no calibration."
            )
        taken = [seconds[each.name] for each in found]
        return MeasuredProgram(self.name, found, taken, step, self._temp_bytes, self._held_bytes)


def measure(
    experiments: Sequence[Experiment], devices: Sequence[jax.Device], *, show: Callable[[int, int, str], None]
) -> list[MeasuredProgram]:
    """Compile and run the experiments' steps; return what they and their operations took."""
    steps = []
    for number, experiment in enumerate(experiments):
        show(number, len(experiments), experiment.name)
        steps.append(RunningStep(experiment, devices))
    show(len(experiments), len(experiments), "their steps, which are timed now")
    return time_together(steps)


def time_together(steps: Sequence[RunningStep]) -> list[MeasuredProgram]:
    """Let the steps take turns, and return what they took at the pace that the machine kept most of the time."""
    for number in range(_TURNS):
        for step in steps:
            step.turn(traced=number in _TRACED_TURNS)
    usual = [statistics.median(step.seconds) for step in steps]
    found = paces(usual, [step.seconds for step in steps])
    return [step.measured(found) for step in steps]


def paces(usual: Sequence[float], seconds: Sequence[Sequence[float]]) -> list[float]:
    """Return for each round how many times as long as usual a program took in it: the median of all programs.

    A machine that is shared, or gets warm, changes its pace by some ten percent within a minute.
    """
    rounds = zip(*seconds, strict=True)
    return [statistics.median(taken / each for taken, each in zip(row, usual, strict=True)) for row in rounds]


def trace(work: Callable[[], object]) -> bytes:
    """Return the profiler's trace of what runs while `work` does, compressed as it is written."""
    with tempfile.TemporaryDirectory(prefix="jaxdist-calibration-") as folder:
        jax.profiler.start_trace(folder)
        try:
            work()
        finally:
            jax.profiler.stop_trace()
        (file,) = pathlib.Path(folder).glob("**/*.trace.json.gz")
        return file.read_bytes()


def operation_seconds(traces: Mapping[bytes, float]) -> dict[str, float]:
    """Return for each operation in the traces its seconds, the median over devices and times.

    `traces` says of each how many times as long as usual its program took then.
    """
    found: dict[str, list[float]] = collections.defaultdict(list)
    for each, pace in traces.items():
        for event in json.loads(gzip.decompress(each))["traceEvents"]:
            name = event.get("args", {}).get("hlo_op")
            if name and event.get("ph") == "X":
                found[name].append(event["dur"] * 1e-6 / pace)
    return {name: statistics.median(seconds) for name, seconds in found.items()}

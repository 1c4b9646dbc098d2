"""Runs training steps on the devices that are here, and times each operation of theirs with JAX's profiler."""

import collections
import gzip
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax

from jaxdist.config.experiment import Experiment
from jaxdist.errors import UserError
from jaxdist.plan.calibrated.operation_rates import MeasuredProgram
from jaxdist.plan.compiled.operations import operations
from jaxdist.run import components

_TURNS, _TURN_SECONDS = 5, 0.12
_TRACED_TURNS, _TRACED_STEPS = (1, 2, 4), 4


class RunningStep:
    """A training step that is compiled and takes steps when told to.

    Attributes:
      name: of its experiment.
    """

    def __init__(self, experiment: Experiment, devices: Sequence[jax.Device]):
        self.name = experiment.name
        parts = components.put_together(experiment, devices=devices)
        self._state, (self._batch, _) = parts.create_state(), next(iter(parts.batches()))
        self._step = cast("Any", parts.step)
        compiled = self._step.trace(self._state, self._batch).lower().compile()
        self._hlo: str = compiled.as_text()
        self._temp_bytes: int = compiled.memory_analysis().temp_size_in_bytes
        self._seconds: list[float] = []
        self._traces: list[bytes] = []
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
        self._seconds.append(self.run(max(int(_TURN_SECONDS / seconds), 2)))
        if traced:
            self._traces.append(trace(lambda: self.run(_TRACED_STEPS)))

    def measured(self) -> MeasuredProgram:
        """Return the medians of all turns.

        Raises:
          UserError: the profiler of this version of JAX does not name operations.
        """
        seconds = operation_seconds(self._traces)
        found = [each for each in operations(self._hlo) if each.name in seconds]
        if self._traces and not found:
            raise UserError(
                "Calibrating needs JAX's profiler, and its trace names no operation of the program that ran. "
                "Leave --calibrate out: the bounds need no calibration."
            )
        taken = [seconds[each.name] for each in found]
        return MeasuredProgram(self.name, found, taken, statistics.median(self._seconds), self._temp_bytes)


def measure(
    experiments: Sequence[Experiment], devices: Sequence[jax.Device], *, show: Callable[[int, int, str], None]
) -> list[MeasuredProgram]:
    """Compile and run the experiments' steps; return what they and their operations took."""
    steps = []
    for number, experiment in enumerate(experiments):
        show(number, len(experiments), experiment.name)
        steps.append(RunningStep(experiment, devices))
    return time_together(steps)


def time_together(steps: Sequence[RunningStep]) -> list[MeasuredProgram]:
    """Let the steps take turns, and return what they took: what slows the machine down for a while slows all."""
    for number in range(_TURNS):
        for step in steps:
            step.turn(traced=number in _TRACED_TURNS)
    return [step.measured() for step in steps]


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


def operation_seconds(traces: Iterable[bytes]) -> dict[str, float]:
    """Return for each operation in the traces its seconds, the median over devices and times."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for each in traces:
        for event in json.loads(gzip.decompress(each))["traceEvents"]:
            name = event.get("args", {}).get("hlo_op")
            if name and event.get("ph") == "X":
                found[name].append(event["dur"] * 1e-6)
    return {name: statistics.median(seconds) for name, seconds in found.items()}

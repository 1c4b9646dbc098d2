"""Rates of kinds of operations, fitted to measured times, and the time of a step that follows from them.

The time of an operation is a sum: a cost of starting it, and its bytes, its arithmetic and what else it does, each by a
rate of its kind. The rates are not negative, and fitted so that the sum of all predicted times is that of the
measured ones, each program counting the same: multiplicative updates of maximum likelihood with errors that grow as the
square root of a time (Lucy, 1974; Lee and Seung, 2001). Operations run beside each other, so a step takes another time
than their sum: matrix products, convolutions and the rest each have a factor for it.

Two things depend on the program and not on the operation alone. What a program holds is read from a cache as far as it
fits in one. A step whose temporary memory is large gets it anew from the system each time, page by page, and the system
clears each page: that costs as much as the step's own work, and has a rate of its own.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from jaxdist.plan.compiled.operations import CONVOLUTION, MATMUL, REDUCTION, Operation

CACHE_BYTES = 32 << 20
"""What a program holds is taken to come from memory, and not from a cache, by its share of this."""
FRESH_BYTES = 32 << 20
"""Temporary memory from this size on comes from the system anew in each step: the most that glibc's malloc keeps."""
_LANES = 16
"""Results that a processor computes together: a library computes columns in multiples of it."""
_LEAST_MEASURED = 12
"""Operations of one kind with fewer measurements are fitted with start, bytes and arithmetic alone."""
_SIMPLE = 3
"""How many features are left then."""
_UPDATES = 2000
_PARTS = (MATMUL, CONVOLUTION, "")
_Features: TypeAlias = tuple[float, ...]
_Row: TypeAlias = tuple[_Features, float, float]
"""Features of an operation, its seconds and its weight."""


@dataclasses.dataclass(frozen=True)
class MeasuredProgram:
    """A program that ran: what its operations took, and its whole step.

    Attributes:
      name: for people.
      operations: what it executes.
      seconds: of each operation, in their order.
      step_seconds: of one step as a user waits for it.
      temp_bytes: of the step's temporary memory.
      held_bytes: of its arguments and its temporary memory.
    """

    name: str
    operations: Sequence[Operation]
    seconds: Sequence[float]
    step_seconds: float
    temp_bytes: int = 0
    held_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds for each unit of what an operation does.

    Attributes:
      kinds: kind -> seconds for each unit of `_features`.
      factors: `matmul`, `convolution`, `` -> seconds of a step for each second of such operations, and of all others:
        below 1 where they run beside each other.
      start_seconds: of a step, beside its operations.
      fresh_seconds: of a step for each byte of temporary memory that comes from the system anew.
      error: of the measured programs' own steps, the median relative error.
    """

    kinds: Mapping[str, Sequence[float]]
    factors: Mapping[str, float]
    start_seconds: float
    fresh_seconds: float = 0.0
    error: float = 0.0

    def step_seconds(self, operations: Sequence[Operation], *, temp_bytes: int, held_bytes: int) -> float:
        """Return the predicted time of a step that executes `operations` in so much memory."""
        beside = self.start_seconds + self.fresh_seconds * fresh_bytes(temp_bytes)
        sums = self.operation_seconds(operations, held_bytes)
        return beside + sum(self.factors[name] * seconds for name, seconds in sums.items())

    def of(self, made: MeasuredProgram) -> float:
        """Return the predicted time of a step of a program that was measured."""
        return self.step_seconds(made.operations, temp_bytes=made.temp_bytes, held_bytes=made.held_bytes)

    def operation_seconds(self, operations: Sequence[Operation], held_bytes: int) -> dict[str, float]:
        """Return the sums of the predicted times of `operations`, with the names of `factors`."""
        sums = dict.fromkeys(_PARTS, 0.0)
        for each in operations:
            rates = self.kinds.get(_kind(each), self.kinds[""])
            part = each.kind if each.kind in sums else ""
            sums[part] += each.times * float(np.dot(_features(each, held_bytes), rates))
        return sums


def fresh_bytes(temp_bytes: int) -> int:
    """Return how much of a step's temporary memory comes from the system anew in each step: all or nothing."""
    return temp_bytes if temp_bytes >= FRESH_BYTES else 0


def fit(programs: Sequence[MeasuredProgram]) -> Rates:
    """Return the rates that explain the measured programs best."""
    by_kind: dict[str, list[_Row]] = {"": []}
    for made in programs:
        # Operations that wait for the system to clear their memory say nothing of their own rates.
        if not fresh_bytes(made.temp_bytes):
            for each, seconds in zip(made.operations, made.seconds, strict=True):
                row = (_features(each, made.held_bytes), seconds, 1 / made.step_seconds)
                by_kind[""].append(row)
                by_kind.setdefault(_kind(each), []).append(row)
    kinds = {kind: _fit_kind(kind, rows) for kind, rows in by_kind.items()}
    return _fit_steps(Rates(kinds, dict.fromkeys(_PARTS, 1.0), 0.0), programs)


def _fit_steps(alone: Rates, programs: Sequence[MeasuredProgram]) -> Rates:
    """Return rates with what is beside the operations of a step, and the factors of operations beside each other."""
    sums = [alone.operation_seconds(made.operations, made.held_bytes) for made in programs]
    rows = [
        (1.0, float(fresh_bytes(made.temp_bytes)), *each.values()) for made, each in zip(programs, sums, strict=True)
    ]
    # Each program counts the same, however long its step is.
    steps = np.array([made.step_seconds for made in programs])
    start, fresh, *factors = _nonnegative(np.array(rows) / steps[:, None], np.ones(len(programs)))
    found = Rates(alone.kinds, dict(zip(_PARTS, factors, strict=True)), start, fresh)
    errors = [abs(found.of(made) / made.step_seconds - 1) for made in programs]
    return dataclasses.replace(found, error=statistics.median(errors))


def _kind(operation: Operation) -> str:
    """Return what has rates of its own: threads, libraries, batches and rows make an operation another one."""
    each = operation
    several = each.products > 1 or (each.kind == REDUCTION and each.rows > 1)
    marks = {"split": each.split, "library": each.library, "several": several}
    return ", ".join([each.kind, *(mark for mark, is_set in marks.items() if is_set)])


def _features(operation: Operation, held_bytes: int) -> _Features:
    """Return how much of each there is: start, bytes, FLOPs, bytes from memory, values, costly values, the number of
    products or of rows to add up, and the three faces of a matrix product.
    """
    each = operation
    far = each.num_bytes * min(held_bytes / CACHE_BYTES, 1.0)
    flops = each.flops * (-(-each.columns // _LANES) * _LANES / each.columns if each.columns else 1.0)
    faces = (flops / length if length else 0.0 for length in (each.rows, each.columns, each.depth))
    several = float({MATMUL: each.products, REDUCTION: each.rows}.get(each.kind, 0))
    return (1.0, float(each.num_bytes), flops, far, each.computed, each.costly, several, *faces)


def _fit_kind(kind: str, rows: Sequence[_Row]) -> list[float]:
    matrix = np.array([features for features, _, _ in rows])
    if len(rows) < _LEAST_MEASURED or kind.startswith(CONVOLUTION):
        matrix[:, _SIMPLE:] = 0
    weights = np.array([weight for *_, weight in rows])
    return _nonnegative(matrix * weights[:, None], np.array([seconds for _, seconds, _ in rows]) * weights)


def _nonnegative(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """Return factors, none negative, with which the weighted columns of `matrix` add up to about `target`."""
    size = matrix.max(axis=0)
    used = np.where(size > 0, size, 1.0)
    scaled = matrix / used
    totals = np.maximum(scaled.sum(axis=0), 1e-30)
    factors = np.where(size > 0, target.sum() / scaled.sum(), 0.0)
    for _ in range(_UPDATES):
        factors = factors * (scaled.T @ (target / np.maximum(scaled @ factors, 1e-30))) / totals
    return list((factors / used).tolist())

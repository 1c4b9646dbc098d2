"""Rates of kinds of operations, fitted to measured times, and the time of a step that follows from them.

The time of an operation is a sum: a cost of starting it, and its bytes, its arithmetic and what else it does, each by a
rate of its kind. The rates are not negative, and fitted so that the sum of all predicted times is that of the
measured ones: multiplicative updates of maximum likelihood with errors that grow as the square root of a time (Lucy,
1974; Lee and Seung, 2001).

A step whose temporary memory is large gets it anew from the system each time, page by page, and the system clears each
page: that costs as much as the step's own work, and has a rate of its own.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdist.plan.compiled.operations import CONVOLUTION, MATMUL, REDUCTION, Operation

CACHED_BYTES = 1_000_000
"""Of an operation: bytes above this are taken to come from memory, not from a cache."""
FRESH_BYTES = 32 << 20
"""Temporary memory from this size on comes from the system anew in each step: the most that glibc's malloc keeps."""
_LANES = 16
"""Results that a processor computes together: a library computes columns in multiples of it."""
_LEAST_MEASURED = 12
"""Operations of one kind with fewer measurements are fitted with start, bytes and arithmetic alone."""
_UPDATES = 2000


@dataclasses.dataclass(frozen=True)
class MeasuredProgram:
    """A program that ran: what its operations took, and its whole step.

    Attributes:
      name: for people.
      operations: what it executes.
      seconds: of each operation, in their order.
      step_seconds: of one step as a user waits for it.
      temp_bytes: of the step's temporary memory.
    """

    name: str
    operations: Sequence[Operation]
    seconds: Sequence[float]
    step_seconds: float
    temp_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds for each unit of what an operation does.

    Attributes:
      kinds: kind -> seconds for each unit of `_features`.
      start_seconds: of a step, beside its operations.
      overlap: seconds of a step for each second of its operations: below 1 where they run beside each other.
      fresh_seconds: of a step for each byte of temporary memory that comes from the system anew.
      error: of the measured programs' own steps, the median relative error.
    """

    kinds: Mapping[str, Sequence[float]]
    start_seconds: float
    overlap: float
    fresh_seconds: float = 0.0
    error: float = 0.0

    def step_seconds(self, operations: Sequence[Operation], temp_bytes: int) -> float:
        """Return the predicted time of a step that executes `operations` in so much temporary memory."""
        beside = self.start_seconds + self.fresh_seconds * fresh_bytes(temp_bytes)
        return beside + self.overlap * self.operation_seconds(operations)

    def operation_seconds(self, operations: Sequence[Operation]) -> float:
        """Return the sum of the predicted times of `operations`."""
        return sum(each.times * float(np.dot(_features(each), self._of(each))) for each in operations)

    def _of(self, operation: Operation) -> Sequence[float]:
        kind = _kind(operation)
        return self.kinds[kind] if kind in self.kinds else self.kinds[""]


def fresh_bytes(temp_bytes: int) -> int:
    """Return how much of a step's temporary memory comes from the system anew in each step: all or nothing."""
    return temp_bytes if temp_bytes >= FRESH_BYTES else 0


def fit(programs: Sequence[MeasuredProgram]) -> Rates:
    """Return the rates that explain the measured programs best."""
    # Operations that wait for the system to clear their memory say nothing of their own rates.
    steady = [made for made in programs if not fresh_bytes(made.temp_bytes)]
    measured = [(each, seconds) for made in steady for each, seconds in zip(made.operations, made.seconds, strict=True)]
    by_kind: dict[str, list[tuple[Operation, float]]] = {"": measured}
    for each, seconds in measured:
        by_kind.setdefault(_kind(each), []).append((each, seconds))
    kinds = {kind: _fit_kind(rows) for kind, rows in by_kind.items()}
    alone = Rates(kinds, 0.0, 1.0)
    predicted = np.array([alone.operation_seconds(made.operations) for made in programs])
    steps = np.array([made.step_seconds for made in programs])
    # Each program counts the same, however long its step is.
    fresh = np.array([fresh_bytes(made.temp_bytes) for made in programs])
    shares = np.stack([1 / steps, predicted / steps, fresh / steps], axis=1)
    found = Rates(kinds, *_nonnegative(shares, np.ones(len(programs))))
    errors = [abs(found.step_seconds(made.operations, made.temp_bytes) / made.step_seconds - 1) for made in programs]
    return dataclasses.replace(found, error=statistics.median(errors))


def _kind(operation: Operation) -> str:
    """Return what has rates of its own: threads, libraries, batches and rows make an operation another one."""
    each = operation
    several = each.products > 1 or (each.kind == REDUCTION and each.rows > 1)
    marks = {"split": each.split, "library": each.library, "several": several}
    return ", ".join([each.kind, *(mark for mark, is_set in marks.items() if is_set)])


def _features(operation: Operation) -> tuple[float, ...]:
    """Return how much of each there is: start, bytes, FLOPs, bytes beyond the cache, values, costly values, the number
    of products or of rows to add up, and the three faces of a matrix product.
    """
    each = operation
    beyond = float(max(each.num_bytes - CACHED_BYTES, 0))
    flops = each.flops * (-(-each.columns // _LANES) * _LANES / each.columns if each.columns else 1.0)
    faces = (flops / length if length else 0.0 for length in (each.rows, each.columns, each.depth))
    several = float({MATMUL: each.products, REDUCTION: each.rows}.get(each.kind, 0))
    return (1.0, float(each.num_bytes), flops, beyond, each.computed, each.costly, several, *faces)


def _fit_kind(rows: Sequence[tuple[Operation, float]]) -> list[float]:
    matrix = np.array([_features(each) for each, _ in rows])
    if len(rows) < _LEAST_MEASURED or rows[0][0].kind == CONVOLUTION:
        matrix[:, 3:] = 0
    return _nonnegative(matrix, np.array([seconds for _, seconds in rows]))


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

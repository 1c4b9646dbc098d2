"""From the ids of a batch to its arrays: read, transform, and write each example into its row of fresh arrays.

The arrays of a batch are allocated for it and never written again: on CPU devices JAX may alias them, whatever it is
told.
"""

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from jaxdist.data.source import Example, Source
from jaxdist.metrics import MASK

ExampleFn: TypeAlias = Callable[[Example, np.random.Generator], Example]
"""Maps an example to what the model sees; `random` depends on (seed, epoch, example id) and nothing else."""

HostArrays: TypeAlias = dict[str, np.ndarray]


class ExampleError(ValueError):
    """An example that could not be read or transformed; the message names it, the cause is chained."""


class Plan(NamedTuple):
    """What one process reads for one batch: a row for each id, and whether that row counts (or is padding)."""

    epoch: int
    ids: np.ndarray
    mask: np.ndarray


class Recipe(NamedTuple):
    """How an id becomes an example."""

    source: Source
    example_fn: ExampleFn | None
    seed: int

    @property
    def whole(self) -> bool:
        """Whether the source hands over whole batches and nothing is left to do with their examples."""
        return self.example_fn is None and hasattr(self.source, "__getitems__")


class Assembler(Protocol):
    """Turns plans into batches, possibly ahead of time."""

    def submit(self, plan: Plan) -> Callable[[], HostArrays]:
        """Begin a batch; the returned function waits for it, and raises what its making raised."""

    def close(self) -> None:
        """Drop what is in work and end every thread and process."""


class SerialAssembler:
    """Assembles a batch at the moment it is asked for, in the caller's thread."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def submit(self, plan: Plan) -> Callable[[], HostArrays]:
        """See Assembler."""

        def finish() -> HostArrays:
            if self._recipe.whole:
                return with_mask(gather(self._recipe.source, plan.ids), plan.mask)
            buffer = BatchBuffer(len(plan.ids))
            fill(buffer, self._recipe, plan, 0, len(plan.ids))
            return with_mask(buffer.arrays, plan.mask)

        return finish

    def close(self) -> None:
        """See Assembler."""


class ThreadAssembler:
    """Splits each batch over a pool of threads. Good for what releases the GIL: decoding, files, large copies."""

    def __init__(self, recipe: Recipe, num_threads: int):
        self._recipe, self._num_threads = recipe, num_threads
        self._pool = ThreadPoolExecutor(num_threads, "jaxdist-data")

    def submit(self, plan: Plan) -> Callable[[], HostArrays]:
        """See Assembler."""
        if self._recipe.whole:
            future = self._pool.submit(gather, self._recipe.source, plan.ids)
            return lambda: with_mask(future.result(), plan.mask)
        buffer = BatchBuffer(len(plan.ids))
        bounds = np.linspace(0, len(plan.ids), self._num_threads + 1, dtype=np.int64).tolist()
        futures = [
            self._pool.submit(fill, buffer, self._recipe, plan, begin, end)
            for begin, end in itertools.pairwise(bounds)
            if begin < end
        ]

        def finish() -> HostArrays:
            for future in futures:
                future.result()
            return with_mask(buffer.arrays, plan.mask)

        return finish

    def close(self) -> None:
        """See Assembler."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class BatchBuffer:
    """The arrays of one batch, allocated when the first example shows their shapes; threads may write at once."""

    def __init__(self, num_rows: int):
        self.arrays: HostArrays = {}
        self._num_rows = num_rows
        self._lock = threading.Lock()

    def write(self, row: int, example_id: int, example: Example) -> None:
        """Copy `example` into `row`; ValueError where its fields, shapes or dtypes differ from those of other rows."""
        fields = {name: np.asarray(value) for name, value in example.items()}
        with self._lock:
            if not self.arrays:
                check_fields(fields, example_id)
                self.arrays = {name: np.empty((self._num_rows, *v.shape), v.dtype) for name, v in fields.items()}
        found = {name: (value.shape, value.dtype) for name, value in fields.items()}
        expected = {name: (array.shape[1:], array.dtype) for name, array in self.arrays.items()}
        if found != expected:
            raise ValueError(
                f"Examples of a batch must have the same fields, shapes and dtypes. Example {example_id} has {found}, "
                f"another one of its batch has {expected}. Pad, crop or bucket the examples, in `example_fn` say."
            )
        for name, value in fields.items():
            self.arrays[name][row] = value


def check_fields(fields: Mapping[str, np.ndarray], example_id: int) -> None:
    """Raise ValueError unless each field is an array of numbers."""
    if not fields:
        raise ValueError(f"Example {example_id} has no fields; an example is a dict of arrays.")
    for name, value in fields.items():
        if value.dtype.kind not in "biufcV":
            raise ValueError(
                f"Field {name!r} of example {example_id} has the dtype {value.dtype}, which no device can hold; "
                "turn it into numbers, or leave it out, in `example_fn`."
            )


def fill(buffer: BatchBuffer, recipe: Recipe, plan: Plan, begin: int, end: int) -> None:
    """Make the rows [begin, end) of a batch."""
    for row in range(begin, end):
        example_id = int(plan.ids[row])
        buffer.write(row, example_id, make_example(recipe, plan.epoch, example_id))


def make_example(recipe: Recipe, epoch: int, example_id: int) -> Example:
    """Read one example and transform it; ExampleError where either fails."""
    try:
        example = recipe.source[example_id]
        if recipe.example_fn is None:
            return example
        return recipe.example_fn(example, example_random(recipe.seed, epoch, example_id))
    except Exception as error:  # whatever the user's source or function raises: say which example it was
        raise ExampleError(f"Example {example_id} (epoch {epoch}): {type(error).__name__}: {error}") from error


def example_random(seed: int, epoch: int, example_id: int) -> np.random.Generator:
    """Return the random generator of an example in an epoch: the same in any process, thread and batch."""
    text = f"jaxdist example {seed} {epoch} {example_id}".encode()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.blake2b(text, digest_size=16).digest())))


def gather(source: Source, ids: np.ndarray) -> HostArrays:
    """Return the examples `ids` of a source that reads whole batches, in arrays that only the batch holds."""
    batch = source.__getitems__(ids)  # type: ignore[attr-defined]
    check_fields(batch, int(ids[0]))
    for name, array in batch.items():
        if array.shape[:1] != (len(ids),):
            raise ValueError(f"__getitems__ of {len(ids)} ids returned field {name!r} of shape {array.shape}.")
    # A view might belong to the source, which could then change under JAX's alias of it.
    return {name: array if array.flags.owndata else array.copy() for name, array in batch.items()}


def with_mask(batch: HostArrays, mask: np.ndarray) -> HostArrays:
    """Return the batch with its mask: 0 where `mask` is, and where the example's own mask is."""
    return {**batch, MASK: mask * (batch[MASK].astype(np.float32) if MASK in batch else np.float32(1))}

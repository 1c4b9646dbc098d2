"""From the ids of a batch to its arrays: read, transform, and write each example into its row of fresh arrays.

The arrays of a batch are allocated for it and never written again: on CPU devices JAX may alias them even with
`may_alias=False`.
"""

import contextlib
import hashlib
import itertools
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from jaxdist.data.sources.source import (
    COUNTS,
    MASK,
    CorruptExample,
    Example,
    Source,
    location_of,
    own_fields,
    plain_array,
    reads_batches,
)

ExampleFn: TypeAlias = Callable[[Example, np.random.Generator], Example]
"""Maps an example to what the model sees; `random` depends on (seed, epoch, example id) and nothing else."""

HostArrays: TypeAlias = dict[str, np.ndarray]


class ExampleError(ValueError):
    """An example that could not be read or transformed; the message names it."""


class BadExampleError(ExampleError):
    """An example whose data are corrupt; the message names its file and number."""


class ExampleTimeout(ExampleError):
    """An example that is not ready within the time limit; the message names it."""


class BatchPlan(NamedTuple):
    """What one process reads for one batch: a row for each id, and whether that row counts (or is padding)."""

    epoch: int
    ids: np.ndarray
    mask: np.ndarray


class Recipe(NamedTuple):
    """How an id becomes an example, and what happens to one that cannot be read."""

    source: Source
    example_fn: ExampleFn | None
    seed: int
    on_bad: Literal["raise", "skip"]
    timeout_seconds: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the source returns whole batches whose examples need no further work."""
        return self.example_fn is None and self.on_bad == "raise" and reads_batches(self.source)


class Made(NamedTuple):
    """A batch without its mask, and what was wrong with rows that could not be read, by row.

    Where no row could be read, there are no arrays either.
    """

    arrays: HostArrays
    bad: dict[int, str]


class SerialAssembler:
    """Assembles a batch at the moment it is asked for, in the caller's thread; other assemblers work ahead of time."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def submit(self, plan: BatchPlan) -> Callable[[], Made]:
        """Begin a batch; the returned function waits for it, and raises the error of its assembly, if there was one."""
        return lambda: make_rows(self._recipe, plan.epoch, plan.ids)

    def close(self) -> None:
        """Drop unfinished work and end every thread and process."""


class ThreadAssembler:
    """Divides each batch among a pool of threads, for work that releases the GIL: decoding, files, large copies."""

    def __init__(self, recipe: Recipe, num_threads: int):
        self._recipe, self._num_threads = recipe, num_threads
        self._watch = Watch(recipe)
        self._pool = _Threads(num_threads)

    def submit(self, plan: BatchPlan) -> Callable[[], Made]:
        """See SerialAssembler."""
        if self._recipe.whole:
            whole = self._pool.submit(self._make_whole, plan)
            return lambda: self._watch.wait_for(whole)
        buffer = BatchBuffer(len(plan.ids))
        parts = split_evenly(len(plan.ids), self._num_threads)
        results = [
            self._pool.submit(fill, buffer, self._recipe, plan.epoch, plan.ids, *part, self._watch) for part in parts
        ]

        def finish() -> Made:
            for result in results:
                self._watch.wait_for(result)
            return buffer.finish()

        return finish

    def _make_whole(self, plan: BatchPlan) -> Made:
        with self._watch.making(plan.epoch, int(plan.ids[0])):
            return make_rows(self._recipe, plan.epoch, plan.ids)

    def close(self) -> None:
        """See SerialAssembler; does not wait for an example that has taken too long."""
        self._pool.close(wait=not self._watch.late)


class _Threads:
    """A pool of daemon threads: unlike an executor's, one that never returns does not keep the process from ending."""

    def __init__(self, num_threads: int):
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"jaxdist-data-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        future: Future = Future()
        self._tasks.put((future, function, args))
        return future

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, args = task
            try:
                future.set_result(function(*args))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
            del task, future, function, args  # an idle thread holds no batch

    def close(self, *, wait: bool) -> None:
        """Drop the tasks that no thread has begun, and end the threads."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait and not sys.is_finalizing() else ():  # by then Python has stopped them
            thread.join()


class Watch:
    """Knows which examples threads are making, and since when; raises ExampleTimeout where one takes too long."""

    def __init__(self, recipe: Recipe):
        self.late = False
        self._recipe, self._limit = recipe, recipe.timeout_seconds
        self._current: dict[int, tuple[float, int, int]] = {}

    @contextlib.contextmanager
    def making(self, epoch: int, example_id: int) -> Iterator[None]:
        """Note what the calling thread makes in the block."""
        thread = threading.get_ident()
        self._current[thread] = (time.monotonic(), epoch, example_id)
        try:
            yield
        finally:
            del self._current[thread]

    def wait_for(self, future: Future) -> Any:
        """Return the result of a future, or raise what its making raised."""
        while self._limit is not None and not wait([future], self._limit / 4).done:
            for started, epoch, example_id in [*self._current.values()]:
                if time.monotonic() - started > self._limit:
                    self.late = True
                    raise late(self._recipe, epoch, example_id)
        return future.result()


def late(recipe: Recipe, epoch: int, example_id: int) -> ExampleTimeout:
    """Return the error for an example that takes longer than the limit."""
    location = location_of(recipe.source, example_id)
    return ExampleTimeout(
        f"Example {example_id} (epoch {epoch}){f', {location},' if location else ''} was not ready within "
        f"{recipe.timeout_seconds:g} s. Look at the source and "
        "example_fn for what can wait, such as a network, a lock or an endless loop; or raise data.timeout_seconds."
    )


class BatchBuffer:
    """The arrays of some rows, allocated when the first example shows their shapes; threads may write at once."""

    def __init__(self, num_rows: int, allocate: Callable[[dict[str, tuple]], HostArrays] | None = None):
        """Begin a buffer; `allocate` maps {name: (shape, dtype)} to arrays that nothing else writes."""
        self.arrays: HostArrays = {}
        self.bad: dict[int, str] = {}
        self._num_rows, self._lock = num_rows, threading.Lock()
        self._allocate = allocate or (lambda wanted: {name: np.empty(*spec) for name, spec in wanted.items()})

    def write(self, row: int, example_id: int, example: Example) -> None:
        """Copy `example` into `row`; ValueError where its fields, shapes or dtypes differ from those of other rows."""
        fields = {name: native(plain_array(name, value)) for name, value in example.items()}
        with self._lock:
            if not self.arrays:
                check_fields(fields, example_id)
                wanted = {name: ((self._num_rows, *value.shape), value.dtype) for name, value in fields.items()}
                self.arrays = self._allocate(wanted)
        found = {name: (value.shape, value.dtype) for name, value in fields.items()}
        expected = {name: (array.shape[1:], array.dtype) for name, array in self.arrays.items()}
        if found != expected:
            raise ExampleError(
                f"Examples of a batch must have the same fields, shapes and dtypes. Example {example_id} has {found}, "
                f"another example of its batch has {expected}. Pad, crop or bucket them, for example in `example_fn`."
            )
        for name, value in fields.items():
            copy_into(self.arrays[name][row, ...], value)

    def finish(self) -> Made:
        """Return the rows once all are written: zeros for those that could not be read, no arrays where none could."""
        for array in self.arrays.values() if self.bad else ():
            array[list(self.bad)] = 0
        return Made(self.arrays, self.bad)


def copy_into(target: np.ndarray, value: np.ndarray) -> None:
    """Do `target[...] = value`; this is also fast where the rows of `value` are bytes in reverse order."""
    # This is a mirrored image: see `transforms.DecodeCropFlip`.
    if value.ndim == 3 and value.dtype == np.uint8 and value.strides[1:] == (-value.shape[2], -1):
        # numpy copies byte by byte. Words in reverse order, each to the other byte order, are the same bytes.
        height, width, channels = value.shape
        rows, size = value[:, ::-1, ::-1].reshape(height, width * channels), math.gcd(width * channels, 8)
        target.reshape(rows.shape).view(f">u{size}")[...] = rows.view(f"<u{size}")[:, ::-1]
    else:
        target[...] = value


def make_rows(recipe: Recipe, epoch: int, ids: np.ndarray) -> Made:
    """Make the rows of some ids, one after the other, in arrays that only the caller holds."""
    if recipe.whole:
        return Made(make_whole(recipe, epoch, ids), {})
    buffer = BatchBuffer(len(ids))
    fill(buffer, recipe, epoch, ids, 0, len(ids))
    return buffer.finish()


def make_whole(recipe: Recipe, epoch: int, ids: np.ndarray) -> HostArrays:
    """Return the examples `ids` of a source that reads whole batches; an ExampleError names one that cannot be read."""
    try:
        return gather(recipe.source, ids)
    except Exception:
        for example_id in ids.tolist():
            make_example(recipe, epoch, example_id)
        raise  # each can be read, but not together


def fill(
    buffer: BatchBuffer,
    recipe: Recipe,
    epoch: int,
    ids: np.ndarray,
    begin: int,
    end: int,
    watch: Watch | None = None,
) -> None:
    """Make the rows [begin, end) of a batch."""
    for row in range(begin, end):
        example_id = int(ids[row])
        try:
            with watch.making(epoch, example_id) if watch else contextlib.nullcontext():
                example = make_example(recipe, epoch, example_id)
        except BadExampleError as error:
            if recipe.on_bad == "raise":
                raise
            buffer.bad[row] = str(error)
            continue
        buffer.write(row, example_id, example)


def make_example(recipe: Recipe, epoch: int, example_id: int) -> Example:
    """Read one example and transform it; raise ExampleError if either fails, BadExampleError for corrupt data."""
    try:
        example = recipe.source[example_id]
        if recipe.example_fn is None:
            return example
        made = recipe.example_fn(own_fields(example), example_random(recipe.seed, epoch, example_id))
        if not isinstance(made, Mapping):
            raise TypeError(f"an example_fn returns a dict of fields, but it returned an object of {type(made)}")
        # An example that a filter excluded stays excluded if the function makes a new dict.
        return {**made, COUNTS: example[COUNTS]} if COUNTS in example and COUNTS not in made else made
    except Exception as error:  # whatever the user's source or function raises: say which example it was
        location = location_of(recipe.source, example_id)
        where = f", {location}" if location and location not in str(error) else ""
        place = f"Example {example_id} (epoch {epoch}){where}"
        if isinstance(error, CorruptExample):
            raise BadExampleError(f"{place}: {error}") from error
        raise ExampleError(f"{place}: {type(error).__name__}: {error}") from error


def example_random(seed: int, epoch: int, example_id: int) -> np.random.Generator:
    """Return the random generator of an example in an epoch: the same in any process, thread and batch."""
    text = f"jaxdist example {seed} {epoch} {example_id}".encode()
    seed_sequence = HashedSeed(hashlib.blake2b(text, digest_size=32).digest())
    return np.random.Generator(np.random.PCG64(seed_sequence))  # type: ignore[arg-type]


class HashedSeed(ISeedSequence):
    """A hash as the seed of a bit generator; numpy takes five times as long to seed one with an integer."""

    def __init__(self, digest: bytes):
        self._digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return the first words of the hash."""
        return np.frombuffer(self._digest, dtype)[:n_words]


def gather(source: Source, ids: np.ndarray) -> HostArrays:
    """Return the examples `ids` of a source that reads whole batches, in arrays that only the batch holds."""
    result = Result.of(source.__getitems__, ids)  # type: ignore[attr-defined]
    if not isinstance(result.made, Mapping):
        raise ValueError(
            f"__getitems__ returns a dict of fields, each stacked on dim 0; that of {type(source).__name__} returned "
            f"an object of {type(result.made)}. Stack them, or leave it out: examples are then read one by one."
        )
    batch = own_arrays(result)
    check_fields(batch, int(ids[0]))
    for name, array in batch.items():
        if array.shape[:1] != (len(ids),):
            raise ValueError(f"__getitems__ of {len(ids)} ids returned field {name!r} of shape {array.shape}.")
    return batch


class Result(NamedTuple):
    """What a function of the user returned, and how many references there were to it, and to each value if it is a
    dict.
    """

    made: Any
    references: int
    to_values: Mapping[str, int]

    @classmethod
    def of(cls, function: Callable[..., Any], *args: Any) -> "Result":
        """Return the result of a call."""
        made = function(*args)
        to_values = {name: sys.getrefcount(value) for name, value in made.items()} if type(made) is dict else {}
        return cls(made, sys.getrefcount(made), to_values)


_NEW = Result.of(lambda: {"": np.empty(1)})
"""A result to which there are no other references than to any result."""


def own_arrays(result: Result, given: Iterable[np.ndarray] = ()) -> HostArrays:
    """Return a mapping that a function made as arrays into which nothing else writes.

    JAX may compute with the very memory of a batch. So a view is copied, whose memory is another's, and so is an array
    that something else refers to: a function may fill the same arrays for each batch. `given` are the arrays that the
    function was given, and may return as they are.
    """
    is_new, kept = result.references <= _NEW.references, set(map(id, given))
    arrays = {}
    for name, value in result.made.items():
        array = plain_array(name, value)
        alone = is_new and result.to_values.get(name, math.inf) <= _NEW.to_values[""] and array.flags.owndata
        arrays[name] = native(array if array is value and (alone or id(value) in kept) else array.copy())
    return arrays


def native(array: np.ndarray) -> np.ndarray:
    """Return the array in this machine's byte order, which devices hold."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def check_fields(fields: Mapping[str, np.ndarray], example_id: int) -> None:
    """Raise ValueError unless each field is an array of numbers."""
    if not fields:
        raise ValueError(f"Example {example_id} has no fields; an example is a dict of arrays.")
    for name, value in fields.items():
        if not _fits_a_device(value.dtype):
            raise ValueError(
                f"Field {name!r} of example {example_id} has the dtype {value.dtype}, which no device can hold. "
                "Turn it into numbers, or leave it out, in `example_fn`."
            )


def _fits_a_device(dtype: np.dtype) -> bool:
    """Return whether devices have such numbers; bfloat16 and its like are of numpy's kind V, as records are."""
    if dtype.kind == "V":
        return not issubclass(dtype.type, np.void)
    return dtype.kind in "biufc" and dtype.char not in "gG"


def with_mask(made: Made, mask: np.ndarray) -> HostArrays:
    """Return the batch with its mask: 0 where `mask` is, where an example's own is, and where none could be read."""
    if MASK in made.arrays:
        raise ValueError(
            f"{MASK!r} is the name of the package's own field, which says which rows of a batch count, and the data "
            "have a field of this name. Rename it, for example with data.example_fn."
        )
    mask = mask.copy()  # a batch owns its arrays, which its user may write into
    if made.bad:
        mask[list(made.bad)] = 0
    fields = {name: array for name, array in made.arrays.items() if name != COUNTS}
    if COUNTS not in made.arrays:
        return {**fields, MASK: mask}
    own = made.arrays[COUNTS].astype(np.float32)
    return {**fields, MASK: own * mask.reshape(-1, *[1] * (own.ndim - 1))}


def split_evenly(num_rows: int, num_parts: int) -> list[tuple[int, int]]:
    """Return up to `num_parts` non-empty ranges (begin, end) that make up range(num_rows)."""
    bounds = np.linspace(0, num_rows, num_parts + 1, dtype=np.int64).tolist()
    return [(begin, end) for begin, end in itertools.pairwise(bounds) if begin < end]

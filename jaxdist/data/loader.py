"""From a source to host batches: the ids of each batch, read ahead, the last batch padded and masked.

Every batch is a pure function of (source, seed, epoch, position, global_batch_size). A process computes only its own
rows of it, which are the same in every process, thread and restart.
"""

import collections
import itertools
import logging
import numbers
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from jaxdist.data import assembly, assembly_pool, batch_transforms, fingerprints, order
from jaxdist.data.position import Position
from jaxdist.data.sources.source import MASK, Source
from jaxdist.data.sources.wrap import as_source
from jaxdist.setting_group import show, whole_number

_logger = logging.getLogger(__name__)


class HostBatch(NamedTuple):
    """The rows of a global batch that this process holds, and the position after training on it."""

    batch: assembly.HostArrays
    position: Position


_Assembler: TypeAlias = assembly.SerialAssembler | assembly.ThreadAssembler | assembly_pool.ProcessAssembler
_Pending: TypeAlias = tuple[Callable[[], assembly.Made], assembly.BatchPlan, Position]


class Loader:
    """Iterates over (host batch, Position after it); each call of `iter` starts at `start`.

    Worker processes that have made all batches of one iteration are kept for the next one, until `close` (or the end of
    a `with` block). An iteration that is abandoned ends its workers.

    Args:
      source: the data set, a Source or any map-style data set whose items are dicts (see `wrap.MapSource`).
      global_batch_size: examples of a batch over all processes. The last batch of an epoch is padded up to it with
        copies of its first example, whose mask is 0.
      seed: of the order and of `example_fn`'s randomness.
      shuffle: True for a new permutation of all examples in each epoch, False for the source's order, or an Order. A
        source that has to be read in an order of its own (`Bucketed`, `Sharded`) is, shuffled or not.
      num_epochs: stop when this many epochs, those before `start` included, are done; None continues forever.
      example_fn: called with (example, random).
      batch_fn: called with (batch, random, rows) for each batch; see `batch_transforms.BatchFn`.
      rows: which rows of the global batch this process needs, ascending. None: all of them when iterated directly, and
        what the sharding says when given to `feed`.
      num_threads: threads that assemble batches; 0 assembles in the caller's thread, which is best where the source
        reads whole batches quickly and there is no example_fn: None chooses it there, else one a core, up to 8.
      num_workers: processes that assemble batches, instead of threads; for an example_fn that holds the GIL.
      read_ahead: batches in work beyond the one that is consumed.
      on_bad: "raise" ends with the first example that cannot be read (`CorruptExample`); "skip" leaves a row of zeros
        with mask 0 in its place, logs a warning that names it, and notes it in `skipped`.
      timeout_seconds: the longest time that making one example may take (a batch, where the source returns whole ones);
        then ExampleTimeout ends the iteration and names the example. None waits forever.
      start: a stored position to continue from.
      fingerprint: of the source, where it is known already; taking it may look at every file.

    Raises:
      ValueError: fewer examples than a batch in a loader that trains (it shuffles, or never ends); a position that
        belongs to other data, another seed or another order.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch_size: int,
        seed: int,
        shuffle: bool | order.Order = True,
        num_epochs: int | None = None,
        example_fn: assembly.ExampleFn | None = None,
        batch_fn: batch_transforms.BatchFn | None = None,
        rows: np.ndarray | None = None,
        num_threads: int | None = None,
        num_workers: int = 0,
        read_ahead: int = 2,
        on_bad: Literal["raise", "skip"] = "raise",
        timeout_seconds: float | None = None,
        start: Position | None = None,
        fingerprint: str | None = None,
    ):
        source = as_source(source)
        self.source, self.seed, self.example_fn = source, whole_number("seed", seed, least=0), example_fn
        self.global_batch_size, self.num_epochs, self.read_ahead = global_batch_size, num_epochs, read_ahead
        self.on_bad, self.order, self.batch_fn = on_bad, as_order(shuffle, source), batch_fn
        self.timeout_seconds = timeout_seconds
        self.num_threads = self._choose_threads() if num_threads is None else num_threads
        self.num_workers = num_workers
        self.skipped: list[str] = []
        self.rows = None if rows is None else _checked_rows(rows, global_batch_size)
        _check_counts(self, trains=shuffle is not False or num_epochs is None)
        _check_stream(self)
        fingerprint = source.fingerprint() if fingerprint is None else fingerprint
        self.beginning = Position(0, 0, len(source), self.seed, self.order.version, fingerprint)
        if start is not None:
            start.check_resumable(self.beginning)
        self.start = self.beginning if start is None else start
        self._kept = _KeptWorkers()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch, the padded one included."""
        return self.order.num_batches(len(self.source), self.global_batch_size)

    def with_rows(self, rows: np.ndarray) -> "Loader":
        """Return a loader of the same global batches for other rows of them; the two share their workers."""
        return self._with(rows=_checked_rows(rows, self.global_batch_size))

    def starting_at(self, position: Position) -> "Loader":
        """Return a loader that starts at `position` of the same data; the two share their workers."""
        position.check_resumable(self.beginning)
        return self._with(start=position)

    def _with(self, **changes: object) -> "Loader":
        other = object.__new__(Loader)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def close(self) -> None:
        """End the worker processes that are kept for the next iteration; the loader can still be iterated."""
        self._kept.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Generator[HostBatch, None, None]:
        assembler = self._make_assembler()
        finished = False
        pending: collections.deque[_Pending] = collections.deque()
        try:
            for plan, after in self._plans(self._rows_read()):
                pending.append((assembler.submit(plan), plan, after))
                if len(pending) > self.read_ahead:
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())
            finished = True
        finally:
            if not (finished and isinstance(assembler, assembly_pool.ProcessAssembler) and self._kept.keep(assembler)):
                assembler.close()

    def plans(self) -> Iterator[assembly.BatchPlan]:
        """Yield the ids of the batches, without reading examples."""
        return (plan for plan, _ in self._plans(self.rows))

    def first_example(self) -> assembly.HostArrays:
        """Return the first example from `start` that can be read, as a batch of one row, mask included."""
        for plan in itertools.islice(self.plans(), self.steps_per_epoch):
            for example_id in plan.ids:
                made = self._make_now(plan.epoch, np.array([example_id]))
                if made.arrays:
                    return self._changed(assembly.with_mask(made, np.ones(1, np.float32)))
        raise assembly.ExampleError("No example of the whole data set can be read.")

    def samples(
        self, num_batches: int, *, among: int | None = None
    ) -> Iterator[tuple[np.ndarray, assembly.HostArrays]]:
        """Yield the ids of the first and the last example of some batches of an epoch, and both as a batch has them.

        `among` is the number of batches to choose from, since later ones take time to find; None for all of an epoch.

        Raises:
          ValueError: an example cannot be read, or cannot be in one batch with the other.
        """
        # What can only be read forward would be read up to the last of them.
        among = 1 if getattr(self.source, "reads_forward", False) else among
        last = min(self.steps_per_epoch, among or self.steps_per_epoch) - 1
        chosen = set(np.linspace(0, last, min(num_batches, last + 1), dtype=int).tolist())
        for number, plan in zip(range(last + 1), self.plans()):
            if number in chosen:
                ids = plan.ids[np.flatnonzero(plan.mask)[[0, -1]]]
                made = self._make_now(plan.epoch, ids)
                if made.arrays:
                    yield ids, self._changed(assembly.with_mask(made, np.ones(2, np.float32)))

    def any_counts(self, most: int) -> bool:
        """Return whether one of the first `most` examples of an epoch, in whole batches, counts."""
        num_batches = min(self.steps_per_epoch, -(-most // self.global_batch_size))
        for plan in itertools.islice(self.plans(), num_batches):
            made = self._make_now(plan.epoch, plan.ids)
            if made.arrays and assembly.with_mask(made, plan.mask)[MASK].any():
                return True
        return False

    def _make_now(self, epoch: int, ids: np.ndarray) -> assembly.Made:
        """Return the rows of some ids, within the time limit."""
        if self.timeout_seconds is None:
            return assembly.make_rows(self.recipe, epoch, ids)
        assembler = assembly.ThreadAssembler(self.recipe, 1)
        try:
            return assembler.submit(assembly.BatchPlan(epoch, ids, np.ones(len(ids), np.float32)))()
        finally:
            assembler.close()

    def _finish(self, finish: Callable[[], assembly.Made], plan: assembly.BatchPlan, after: Position) -> HostBatch:
        made = finish()
        for message in made.bad.values():
            _logger.warning("Skipped a bad example, %d so far: %s", len(self.skipped) + 1, message)
            self.skipped.append(message)
        if not made.arrays:
            made = made._replace(arrays=self._zeros(len(plan.ids)))
        batch = assembly.with_mask(made, plan.mask)
        return HostBatch(batch if self.batch_fn is None else self._mixed(batch, after), after)

    def _mixed(self, batch: assembly.HostArrays, after: Position) -> assembly.HostArrays:
        """Return this process's rows of what `batch_fn` makes of the rows that were read."""
        assert self.batch_fn is not None
        read, size = self._rows_read(), self.global_batch_size
        rows = batch_transforms.BatchRows(np.arange(size) if read is None else read, size)
        identity = (self.seed, after.epoch, after.position)
        return batch_transforms.change(self.batch_fn, batch, rows, keep=self.rows, identity=identity)

    def _rows_read(self) -> np.ndarray | None:
        """Return the rows of the global batch that this process reads; None for all."""
        if self.rows is None or self.batch_fn is None:
            return self.rows
        return batch_transforms.rows_to_read(self.batch_fn, self.rows, self.global_batch_size)

    def _changed(self, batch: assembly.HostArrays) -> assembly.HostArrays:
        """Return some examples as a batch of training has them."""
        if self.batch_fn is None:
            return batch
        size = len(batch[MASK])
        rows = batch_transforms.BatchRows(np.arange(size), size)
        return batch_transforms.change(self.batch_fn, batch, rows, keep=None, identity=(self.seed, 0, 0))

    def _zeros(self, num_rows: int) -> assembly.HostArrays:
        """Return a batch of zeros, for a batch without a readable row."""
        first = self._with(start=self.beginning, batch_fn=None).first_example()
        return {
            name: np.zeros((num_rows, *array.shape[1:]), array.dtype) for name, array in first.items() if name != MASK
        }

    @property
    def recipe(self) -> assembly.Recipe:
        """How an id becomes an example."""
        return assembly.Recipe(self.source, self.example_fn, self.seed, self.on_bad, self.timeout_seconds)

    def _choose_threads(self) -> int:
        # A handover between threads costs more than gathering a batch from memory; `feed` reads ahead in any case.
        return 0 if self.recipe.whole else min(os.cpu_count() or 1, 8)

    @property
    def assembles_itself(self) -> bool:
        """Whether batches are made one after the other, in the thread that iterates."""
        return not self.num_workers and self.num_threads == 0 and self.timeout_seconds is None

    @property
    def takes_rows_from_memory(self) -> bool:
        """Whether making a batch is to copy some rows of arrays in memory, and so takes a moment, always."""
        in_memory = getattr(self.source, "in_memory", False)
        return in_memory and self.assembles_itself and self.recipe.whole and self.batch_fn is None

    def _make_assembler(self) -> _Assembler:
        recipe = self.recipe
        if self.num_workers:
            kept = self._kept.take()
            return kept or assembly_pool.ProcessAssembler(recipe, self.num_workers, num_slots=self.read_ahead + 1)
        if self.assembles_itself:
            return assembly.SerialAssembler(recipe)
        return assembly.ThreadAssembler(recipe, max(self.num_threads, 1))

    def _plans(self, chosen: np.ndarray | None) -> Iterator[tuple[assembly.BatchPlan, Position]]:
        """Yield what to read for the chosen rows of each batch (None: all), and the position after it."""
        num_examples, epoch, position = len(self.source), self.start.epoch, self.start.position
        rows = slice(None) if chosen is None else as_slice(chosen)
        names = self.beginning.order_version, self.beginning.fingerprint
        while self.num_epochs is None or epoch < self.num_epochs:
            for batch in self.order.batches(num_examples, self.seed, epoch, position, self.global_batch_size):
                plan = assembly.BatchPlan(epoch, batch.ids[rows], batch.mask[rows])
                yield plan, Position(epoch, batch.after, num_examples, self.seed, *names)
            epoch, position = epoch + 1, 0


class _KeptWorkers:
    """The idle workers of a loader and of the loaders made from it; they end with the last of those loaders."""

    def __init__(self) -> None:
        self._idle: list[assembly_pool.ProcessAssembler] = []
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _close_all, self._idle)

    def take(self) -> assembly_pool.ProcessAssembler | None:
        """Return idle workers, which the caller then owns; None where there are none."""
        with self._lock:
            return self._idle.pop() if self._idle else None

    def keep(self, assembler: assembly_pool.ProcessAssembler) -> bool:
        """Keep `assembler` and return True; return False if others are kept already."""
        with self._lock:
            if not self._idle:
                self._idle.append(assembler)
                return True
            return False

    def close(self) -> None:
        """End the kept workers."""
        with self._lock:
            _close_all(self._idle)


def _close_all(assemblers: list[assembly_pool.ProcessAssembler]) -> None:
    while assemblers:
        assemblers.pop().close()


def as_order(shuffle: bool | order.Order, source: Source) -> order.Order:
    """Return the order that `shuffle` asks for; the source's own if it needs one, as buckets do."""
    if not isinstance(shuffle, bool):
        return shuffle
    if callable(own := getattr(source, "order", None)):  # an array of that name is something of the user's own
        return own(shuffle=shuffle)
    return order.Shuffled() if shuffle else order.Sequential()


def as_slice(rows: np.ndarray) -> slice | np.ndarray:
    """Return ascending rows as a slice where they follow each other, so that taking them is no copy."""
    return slice(int(rows[0]), int(rows[-1]) + 1) if (np.diff(rows) == 1).all() else rows


def _checked_rows(rows: np.ndarray, global_batch_size: int) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 1 or not len(rows) or rows[0] < 0 or rows[-1] >= global_batch_size or (np.diff(rows) <= 0).any():
        raise ValueError(
            f"rows must be one or more ascending row numbers in [0, {global_batch_size}), the global batch; "
            f"got {rows}. `jaxdist.data.placement.process_rows` computes them."
        )
    return rows


def _check_stream(loader: Loader) -> None:
    """Raise ValueError where a source that is read forward cannot be read as asked."""
    if not getattr(loader.source, "reads_forward", False):
        inside = any(getattr(leaf, "reads_forward", False) for leaf in fingerprints.leaves(loader.source))
        if inside and loader.order != order.Sequential():
            raise ValueError(
                f"A stream is read forward, and {type(loader.source).__name__} would ask for its examples in any "
                "order. Give the stream itself, or one stream with the shards of all, or write the examples to files "
                "(`jaxdist data prepare`)."
            )
        return
    loader.source.check_order(loader.order)  # type: ignore[attr-defined]
    if loader.num_workers:
        raise ValueError(
            f"A stream is read forward by one process, so that worker processes would each read all of it; got "
            f"num_workers={loader.num_workers}. Use num_threads."
        )


def _check_counts(loader: Loader, *, trains: bool) -> None:
    num_examples, global_batch_size = len(loader.source), loader.global_batch_size
    for name, least in (("global_batch_size", 1), ("num_threads", 0), ("num_workers", 0), ("read_ahead", 0)):
        setattr(loader, name, whole_number(name, getattr(loader, name), least=least))
    if loader.num_epochs is not None:
        whole_number("num_epochs", loader.num_epochs)
    limit = loader.timeout_seconds
    if limit is not None and not (isinstance(limit, numbers.Real) and 0 < limit <= threading.TIMEOUT_MAX):
        raise ValueError(f"timeout_seconds is finite and above 0, or None to wait forever; got {show(limit)}.")
    loader.timeout_seconds = None if limit is None else float(limit)
    if loader.on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad is 'raise' or 'skip'; got {loader.on_bad!r}.")
    if num_examples == 0:
        raise ValueError("The source is empty; a loader needs at least one example.")
    if trains and num_examples < global_batch_size:
        raise ValueError(
            f"Training needs at least one batch of examples: the source has {num_examples}, global_batch_size is "
            f"{global_batch_size}. Lower global_batch_size to {num_examples} or less, or add data."
        )

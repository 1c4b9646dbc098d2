"""Assembly in worker processes, for transforms that hold the GIL.

Each worker owns a few slots of shared memory. It writes the requested rows into a slot and reports that; the trainer
copies them into the batch's fresh arrays, which frees the slot. Pipes carry ids and reports only. The trainer's side
runs in one thread, the one that iterates.
"""

import collections
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import pathlib
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np

from jaxdist.data.assembly import BadExampleError, BatchPlan, ExampleError, HostArrays, Made, Recipe, late, split_evenly
from jaxdist.data.assembly_process import CURRENT, MadeRows, Slot, Task, Trouble, dump_recipe, run_assembly_process

_SHARED_MEMORY = pathlib.Path("/dev/shm")


class AssemblyProcessDied(RuntimeError):
    """A worker process ended while it was needed; the message names the example it was making."""


class ProcessAssembler:
    """Divides each batch among worker processes; `close` ends them.

    Source and example_fn of the recipe must be picklable. `num_slots` is how many parts of batches each worker may have
    in work or finished at a time.
    """

    def __init__(self, recipe: Recipe, num_workers: int, num_slots: int):
        self._waiting: collections.deque[_Part] = collections.deque()
        self._recipe = recipe
        payload = dump_recipe(recipe)
        self._workers: list[_AssemblyProcess] = []
        # Workers ignore SIGTERM: where a script ends within an iteration, multiprocessing would wait for them forever.
        self._kill = multiprocessing.util.Finalize(self, _kill_all, args=(self._workers,), exitpriority=0)
        for number in range(num_workers):
            self._workers.append(_AssemblyProcess(number, payload, num_slots))

    def submit(self, plan: BatchPlan) -> Callable[[], Made]:
        """See SerialAssembler."""
        ranges = split_evenly(len(plan.ids), len(self._workers))
        batch = _Batch(len(plan.ids), len(ranges))
        self._waiting += [_Part(batch, begin, plan.epoch, plan.ids[begin:end]) for begin, end in ranges]
        self._dispatch()
        return lambda: self._finish(batch)

    def _finish(self, batch: "_Batch") -> Made:
        while batch.num_missing:
            self._receive()
            self._dispatch()
        return batch.finish()

    def _dispatch(self) -> None:
        """Give waiting parts to workers with free slots, first to the worker with the most."""
        while self._waiting:
            worker = max(self._workers, key=lambda worker: len(worker.free))
            if not worker.free:
                return
            worker.begin(self._waiting.popleft())

    def _receive(self) -> None:
        """Wait for a report or the end of a worker, and handle it."""
        waited: dict[Any, _AssemblyProcess] = {worker.connection: worker for worker in self._workers}
        waited |= {worker.process.sentinel: worker for worker in self._workers}
        limit = self._recipe.timeout_seconds
        ready = multiprocessing.connection.wait(list(waited), limit and limit / 4)
        for worker in () if ready else self._workers:
            worker.check_time(self._recipe)
        for worker in dict.fromkeys(waited[item] for item in ready):
            worker.receive()

    def close(self) -> None:
        """See SerialAssembler. Workers hold no state, so they are killed without a request."""
        self._kill()
        for worker in self._workers:
            worker.close()


def _kill_all(workers: "Sequence[_AssemblyProcess]") -> None:
    for worker in workers:
        worker.process.kill()


class _AssemblyProcess:
    """The trainer's end of one worker process."""

    def __init__(self, number: int, payload: bytes, num_slots: int):
        context = multiprocessing.get_context("spawn")
        self._fds = [_nameless_file() for _ in range(num_slots + 1)]
        os.ftruncate(self._fds[-1], 24)
        self._slots = [Slot(fd) for fd in self._fds[:-1]]
        self._current = Slot(self._fds[-1]).view(CURRENT)
        self.free = list(range(num_slots))
        self._parts: dict[int, _Part] = {}
        self.connection, theirs = context.Pipe()
        # DupFd may only be created while a process is being started, so a wrapper creates it.
        arguments = (theirs, [_Inherited(fd) for fd in self._fds[:-1]], _Inherited(self._fds[-1]), payload)
        self.process = context.Process(
            target=run_assembly_process, args=arguments, name=f"jaxdist-data-{number}", daemon=True
        )
        self.process.start()
        theirs.close()  # so that reading ends when the worker does

    def begin(self, part: "_Part") -> None:
        """Send `part` to the worker, which makes it in a free slot."""
        slot = self.free.pop()
        self._parts[slot] = part
        try:
            self.connection.send(Task(slot, part.epoch, part.ids))
        except BrokenPipeError:
            raise self._died() from None

    def receive(self) -> None:
        """Handle all reports that have arrived; raise AssemblyProcessDied where the worker has ended."""
        try:
            while self.connection.poll():
                self._take(self.connection.recv())
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if not self.process.is_alive():
            raise self._died()

    def check_time(self, recipe: Recipe) -> None:
        """Raise ExampleTimeout where the worker has been making one example for longer than the recipe's limit."""
        epoch, example_id, started = self._current.tolist()
        limit = recipe.timeout_seconds
        if limit is not None and self._parts and started and time.monotonic_ns() - started > limit * 1e9:
            raise late(recipe, epoch, example_id)

    def _take(self, report: MadeRows | Trouble) -> None:
        if isinstance(report, Trouble):
            error = BadExampleError(report.message) if report.corrupt else ExampleError(report.message)
            error.add_note(f"In a worker process:\n{report.trace}")
            if report.slot < 0:
                raise error
            self._parts.pop(report.slot).batch.fail(error)
        else:
            views = {name: self._slots[report.slot].view(place) for name, place in report.places.items()}
            part = self._parts.pop(report.slot)
            part.batch.store(part.begin, views, report.bad)
        self.free.append(report.slot)

    def _died(self) -> AssemblyProcessDied:
        self.process.join(timeout=5)
        code = self.process.exitcode
        epoch, example_id, _ = self._current.tolist()
        doing = f"while making example {example_id} (epoch {epoch})" if self._parts else "while idle"
        return AssemblyProcessDied(f"Worker process {self.process.pid} {how_it_ended(code, doing)}")

    def close(self) -> None:
        """Wait for the end of the killed worker and free its memory."""
        self.process.join()
        self.process.close()
        self.connection.close()
        for fd in self._fds:
            os.close(fd)


def how_it_ended(code: int | None, doing: str) -> str:
    """Return what the exit code of a worker process means, and what to do."""
    if code is None or code >= 0:
        return f"ended with status {code} {doing}. Something in example_fn or the source ended the process."
    hints: dict[int, str] = {
        signal.SIGKILL: "Most likely memory ran out: use fewer workers, or less memory in example_fn.",
        signal.SIGBUS: f"Most likely {_SHARED_MEMORY} is full: enlarge it, or use fewer workers or smaller batches.",
        signal.SIGSEGV: "Native code crashed, for example in a decoder: look at this example.",
    }
    hint = hints.get(-code, "It was sent by another process, or by native code that failed.")
    return f"was killed by signal {-code} {doing}. {hint}"


class _Inherited:
    """A file descriptor as a process argument: the child gets a duplicate of it."""

    def __init__(self, fd: int):
        self._fd = fd

    def __reduce__(self) -> tuple:
        return _identity, (DupFd(self._fd),)


def _identity(value: Any) -> Any:
    return value


class _Batch:
    """The rows of a batch whose parts have arrived so far."""

    def __init__(self, num_rows: int, num_missing: int):
        self.num_missing = num_missing
        self._num_rows = num_rows
        self._arrays: HostArrays = {}
        self._bad: dict[int, str] = {}
        self._error: Exception | None = None

    def store(self, begin: int, rows: HostArrays, bad: dict[int, str]) -> None:
        """Copy rows into the batch from row `begin` on."""
        self.num_missing -= 1
        self._bad |= {begin + row: message for row, message in bad.items()}
        if rows and not self._arrays:
            self._arrays = {name: np.empty((self._num_rows, *v.shape[1:]), v.dtype) for name, v in rows.items()}
        found = {name: (value.shape[1:], value.dtype) for name, value in rows.items()}
        expected = {name: (value.shape[1:], value.dtype) for name, value in self._arrays.items()}
        if rows and found != expected:
            self.fail(
                ExampleError(
                    f"Examples of a batch must have the same fields, shapes and dtypes; got {found} and {expected}. "
                    "Pad, crop or bucket the examples, for example in `example_fn`."
                ),
                missing=0,
            )
            return
        for name, value in rows.items():
            self._arrays[name][begin : begin + len(value)] = value

    def fail(self, error: Exception, *, missing: int = 1) -> None:
        """Note the first error of the batch, which `finish` raises."""
        self.num_missing -= missing
        self._error = self._error or error

    def finish(self) -> Made:
        """Return the whole batch, or raise its first error."""
        if self._error is not None:
            raise self._error
        for array in self._arrays.values() if self._bad else ():
            array[list(self._bad)] = 0
        return Made(self._arrays, self._bad)


class _Part(NamedTuple):
    """Some rows of a batch, from `begin` on."""

    batch: _Batch
    begin: int
    epoch: int
    ids: np.ndarray


def _nameless_file() -> int:
    """Return a new file in memory without a name, which exists until the last process that has it open closes it."""
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())

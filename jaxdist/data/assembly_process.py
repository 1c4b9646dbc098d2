"""The code of a worker process, and what it shares with the trainer: tasks, reports and slots of memory.

The trainer's side is in `assembly_pool`.
"""

import importlib.util
import io
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import signal
import sys
import threading
import time
import traceback
from importlib.machinery import PathFinder
from typing import Any, NamedTuple

import numpy as np

from jaxdist.data.assembly import BadExampleError, BatchBuffer, HostArrays, Recipe, fill, make_whole
from jaxdist.errors import ExitStatus

_ALIGNMENT = 64


class Task(NamedTuple):
    """Rows to make, and the slot to put them in."""

    slot: int
    epoch: int
    ids: np.ndarray


class ArrayPlace(NamedTuple):
    """Where an array is stored in a slot."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


CURRENT = ArrayPlace((3,), np.dtype(np.int64), 0)
"""What a worker says of the example it makes: epoch, id, and since when (ns of the clock that all processes share).

A time of 0 says that it makes none.
"""


class MadeRows(NamedTuple):
    """Report: the rows are stored in the slot; `bad` describes those that could not be read."""

    slot: int
    places: dict[str, ArrayPlace]
    bad: dict[int, str]


class Trouble(NamedTuple):
    """Report: making the rows raised an error; `corrupt` if its cause is the data and not the code."""

    slot: int
    message: str
    trace: str
    corrupt: bool = False


class Slot:
    """Memory shared by two processes: a file without a name, which grows when needed."""

    def __init__(self, fd: int):
        self._fd = fd
        self._map: mmap.mmap | None = None

    def reserve(self, size: int) -> None:
        """Make the slot at least `size` bytes large."""
        if os.fstat(self._fd).st_size < size:
            os.ftruncate(self._fd, size)

    def view(self, place: ArrayPlace) -> np.ndarray:
        """Return the array stored at `place`; it stays valid until the slot is reported free."""
        count = int(np.prod(place.shape))
        if not count:
            return np.empty(place.shape, place.dtype)
        if self._map is None or len(self._map) < place.offset + count * place.dtype.itemsize:
            self._map = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
        return np.frombuffer(self._map, place.dtype, count, place.offset).reshape(place.shape)


def run_assembly_process(
    connection: multiprocessing.connection.Connection,
    slot_files: list[Any],
    current_file: Any,
    payload: bytes,
) -> None:
    """Serve tasks until the connection ends; the main function of a worker process, which inherits the files (DupFd).

    `current_file` always holds `CURRENT`, so that the trainer can name the example if this process dies or hangs.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to a whole group, and handled by the trainer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"  # in case a transform uses JAX: the accelerators belong to the trainer
    try:
        slots = [Slot(file.detach()) for file in slot_files]
        current = Slot(current_file.detach()).view(CURRENT)
        recipe = load_recipe(payload)
    except Exception as error:  # reported to the trainer, which raises it
        connection.send(Trouble(-1, f"A worker process could not start: {error!r}", traceback.format_exc()))
        return
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_report(recipe, slots[task.slot], current, task))


def _report(recipe: Recipe, slot: Slot, current: np.ndarray, task: Task) -> MadeRows | Trouble:
    places: dict[str, ArrayPlace] = {}

    def allocate(wanted: dict[str, tuple]) -> HostArrays:
        offset = 0
        for name, (shape, dtype) in wanted.items():
            places[name] = ArrayPlace(shape, dtype, offset)
            offset += -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        slot.reserve(offset)
        return {name: slot.view(place) for name, place in places.items()}

    try:
        current[:] = task.epoch, task.ids[0], time.monotonic_ns()
        if recipe.whole:
            arrays = make_whole(recipe, task.epoch, task.ids)
            for name, view in allocate({name: (array.shape, array.dtype) for name, array in arrays.items()}).items():
                view[...] = arrays[name]
            return MadeRows(task.slot, places, {})
        buffer = BatchBuffer(len(task.ids), allocate)
        for row, example_id in enumerate(task.ids.tolist()):
            current[1:] = example_id, time.monotonic_ns()
            fill(buffer, recipe, task.epoch, task.ids, row, row + 1)
        return MadeRows(task.slot, places, buffer.bad)
    except Exception as error:  # reported to the trainer, which raises it
        return Trouble(task.slot, str(error), traceback.format_exc(), isinstance(error, BadExampleError))
    finally:
        current[2] = 0


def _end_with_parent() -> None:
    """End this process when the trainer has ended, for any reason and during any transform."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(ExitStatus.FAILED)


class _ModuleFinder(pickle.Pickler):
    """A pickler that records the modules of all classes and functions in the object."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.modules: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        self.modules.add(getattr(obj, "__module__", None) or "")
        return NotImplemented


def dump_recipe(recipe: Recipe) -> bytes:
    """Return the recipe as bytes for `load_recipe` in another process.

    A module that was loaded from a file and cannot be imported by name, such as an experiment, is sent as its path.

    Raises:
      ValueError: the source or the example_fn cannot be pickled.
    """
    file = io.BytesIO()
    pickler = _ModuleFinder(file)
    try:
        pickler.dump(recipe)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"Worker processes need a source and an example_fn that can be pickled: {error}. Define the function "
            "at the top level of a module (not as a lambda), or use threads: num_workers=0."
        ) from error
    paths = {}
    for name in sorted(pickler.modules):
        path = getattr(sys.modules.get(name), "__file__", None)
        if path and name not in ("", "__main__", "__mp_main__") and "." not in name:
            spec = PathFinder.find_spec(name)
            if spec is None or spec.origin != path:
                paths[name] = os.path.abspath(path)
    return pickle.dumps((paths, file.getvalue()))


def load_recipe(payload: bytes) -> Recipe:
    """Return the recipe from the bytes of `dump_recipe`."""
    paths, recipe = pickle.loads(payload)
    for name, path in paths.items():
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(pathlib.Path(path).parent))
        spec.loader.exec_module(sys.modules[name])
    return pickle.loads(recipe)

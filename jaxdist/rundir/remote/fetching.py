"""A remote run directory as a directory on this machine: its files, and the checkpoints asked for, verified."""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxdist import errors
from jaxdist.checkpoint import step_names
from jaxdist.errors import UserError
from jaxdist.rundir import files, lock
from jaxdist.rundir.remote import job_object, mirror, run_store, uploads
from jaxdist.rundir.remote.run_address import Address, RunPlace, place_of_run
from jaxdist.rundir.remote.run_store import RunStore, StoreError

_NOT_FETCHED = (step_names.FOLDER_NAME, uploads.FOLDER, "set-aside", "profile", job_object.NAME, job_object.LAST_JOB)
"""Folders and files at the top that a run neither continues from nor is shown by."""
_DRAFT = "removed-fetch-"
"""A checkpoint under this name is removed by the next save, as what an interrupted removal left is."""

Choice = Callable[[set[str], dict[str, Any]], Iterable[str]]
"""Chooses among the names of the checkpoints that are whole, given the run record."""


def holds_run(store: RunStore) -> bool:
    """Return whether a store holds a run record; raises StoreError."""
    return store.read(mirror.RECORD) is not None


def fetch_files(store: RunStore, run_dir: pathlib.Path) -> dict[str, mirror.Signature]:
    """Download the files of a run without its checkpoints; return their signatures on this machine."""
    names = [name for name in store.sizes() if name.split("/")[0] not in _NOT_FETCHED]
    # The record is last: a directory with it has the rest.
    for name in sorted(names, key=lambda name: name == mirror.RECORD):
        store.download(name, run_dir / name)
    return mirror.signatures(run_dir)


def fetch_checkpoints(store: RunStore, run_dir: pathlib.Path, choose: Choice) -> list[str]:
    """Download the checkpoints that `choose` names and that are not there already; return their names.

    Raises:
      UserError: one is damaged; the message says which others are whole.
    """
    names = mirror.uploaded_names(store)
    chosen = sorted(set(choose(names, _record(run_dir))) & names, key=uploads.order)
    for name in chosen:
        try:
            _fetch_checkpoint(store, run_dir / step_names.FOLDER_NAME, name)
        except uploads.DamagedUploadError as error:
            others = ", ".join(str(step) for step in sorted({uploads.order(other)[0] for other in names - {name}}))
            advice = f"Those of steps {others} were uploaded, too" if others else "It is the only one"
            raise UserError(
                f"The checkpoint of step {uploads.order(name)[0]} in {store.address} is damaged: {error} {advice}. "
                "To use another, name its step with --checkpoint; to continue the run without this one, remove "
                f"{uploads.object_name(name)} there."
            ) from error
    return chosen


def _fetch_checkpoint(store: RunStore, folder: pathlib.Path, name: str) -> None:
    if (folder / name).exists():
        return
    content = store.read(uploads.object_name(name))
    if content is None:
        return  # removed by the run meanwhile
    made = uploads.UploadedCheckpoint.from_bytes(content, name)
    draft = folder / f"{_DRAFT}{name}"
    shutil.rmtree(draft, ignore_errors=True)
    there = store.sizes(made.folder)
    for file in made.files:
        if f"{made.folder}/{file}" not in there:
            raise uploads.DamagedUploadError(f"{made.folder}/{file} is missing.")
        store.download(f"{made.folder}/{file}", draft / file)
    made.check(draft)
    draft.rename(folder / name)


def newest_and_best(names: set[str], made: dict[str, Any]) -> set[str]:
    """Choose the newest checkpoint, and the best: what a run continues from, and what is used of it."""
    best = (made.get("best") or {}).get("step")
    newest = max(names, key=uploads.order, default=None)
    return {name for name in names if name == newest or uploads.order(name)[0] == best}


def since(step: int) -> Choice:
    """Return the choice of a step, of all that are newer, which a run that goes back sets aside, and of the best."""
    return lambda names, made: newest_and_best(names, made) | {name for name in names if uploads.order(name)[0] >= step}


def newest_before(step: int) -> Choice:
    """Return the choice of the newest checkpoint of a step before `step`."""

    def choose(names: set[str], made: dict[str, Any]) -> set[str]:
        del made
        return set(sorted((name for name in names if uploads.order(name)[0] < step), key=uploads.order)[-1:])

    return choose


def one(checkpoint: str | int) -> Choice:
    """Return the choice of one checkpoint: "best" (the newest, where the run watched no metric), "last", or a step."""

    def choose(names: set[str], made: dict[str, Any]) -> set[str]:
        best = (made.get("best") or {}).get("step")
        if checkpoint == "last" or (checkpoint == "best" and best is None):
            return set(sorted(names, key=uploads.order)[-1:])
        step = best if checkpoint == "best" else checkpoint
        found = {name for name in names if uploads.order(name)[0] == step}
        if names and not found:
            steps = ", ".join(str(step) for step in sorted({uploads.order(name)[0] for name in names}))
            raise UserError(f"There is no checkpoint {checkpoint!r} (step {step}); those of steps {steps} are there.")
        return found

    return choose


def nothing(names: set[str], made: dict[str, Any]) -> set[str]:
    """Choose no checkpoint."""
    del names, made
    return set()


@contextlib.contextmanager
def fetched(place: RunPlace | str, choose: Choice = nothing) -> Iterator[pathlib.Path]:
    """Yield a run directory on this machine: a local one itself, a remote one as a copy that is removed afterwards.

    Raises:
      UserError: the remote one holds no run, or does not answer, or a chosen checkpoint is damaged.
    """
    address = as_address(place)
    if address is None:
        yield pathlib.Path(str(place))
        return
    store = run_store.open_store(address)
    with tempfile.TemporaryDirectory(prefix="jaxdist-fetched-") as folder, contextlib.ExitStack() as stack:
        # The name of the run is shown by reports and comparisons.
        run_dir = pathlib.Path(folder) / (address.name or "run")
        with reading(store):
            if not holds_run(store):
                raise UserError(f"A run directory holds {mirror.RECORD}; {address} does not. Name another.")
            fetch_files(store, run_dir)
            fetch_checkpoints(store, run_dir, choose)
            _lock_like(store, "", run_dir, stack)
        with named_as(address, run_dir):
            yield run_dir


@contextlib.contextmanager
def all_fetched(places: Sequence[RunPlace | str]) -> Iterator[list[pathlib.Path]]:
    """Yield several run directories on this machine, without the checkpoints of remote ones; see `fetched`."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(fetched(place)) for place in places]


@contextlib.contextmanager
def folder_fetched(place: RunPlace | str) -> Iterator[pathlib.Path]:
    """Yield a folder of run directories on this machine; of a remote one the run records.

    Raises:
      UserError: it cannot be read.
    """
    address = as_address(place)
    if address is None:
        yield pathlib.Path(str(place))
        return
    store = run_store.open_store(address)
    with tempfile.TemporaryDirectory(prefix="jaxdist-fetched-") as folder, contextlib.ExitStack() as stack:
        with reading(store):
            for name in store.folders():
                if content := store.read(f"{name}/{mirror.RECORD}"):
                    copy = pathlib.Path(folder) / name
                    copy.mkdir(parents=True)
                    files.write(copy / mirror.RECORD, [content])
                    _lock_like(store, name, copy, stack)
        yield pathlib.Path(folder)


def _lock_like(store: RunStore, name: str, copy: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Lock a copy of a run directory while a job holds the remote one, so that it is seen to be running."""
    owner = job_object.owner_of(store, name)
    if owner is not None and not owner.is_dead(job_object.QUIET):
        stack.enter_context(lock.locked(copy, purpose=owner.purpose))


def as_address(place: RunPlace | str) -> Address | None:
    """Return the address of a remote run directory, None if it is local."""
    found = place_of_run(place) if isinstance(place, str) else place
    return found if isinstance(found, Address) else None


def named_as(address: Address, *paths: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Let the message of a mistake name the address, which the user knows, and not a copy on this machine."""
    return errors.reworded({str(path): str(address) for path in paths})


@contextlib.contextmanager
def reading(store: RunStore) -> Iterator[None]:
    """Turn a storage that does not answer into a mistake of the user, who may have to wait."""
    try:
        yield
    except StoreError as error:
        raise UserError(
            f"{store.address} cannot be read: {error}. Check the address, the credentials and the network."
        ) from error


def _record(run_dir: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / mirror.RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

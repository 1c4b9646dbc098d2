"""A run whose directory is remote: it trains in a working copy on this machine, which a mirror uploads.

The working copy has a place of its own for each address, so that a run that is killed continues from what its machine
still has. It is removed when all of it is uploaded. Whether it is newer than what is remote is decided by the job that
wrote last, which the working copy and the remote directory both note.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

from jaxdist import errors
from jaxdist.rundir import files, full_disk, lock
from jaxdist.rundir.remote import fetching, job_object, mirror, run_store
from jaxdist.rundir.remote.run_address import Address

FOLDER_VARIABLE = "JAXDIST_REMOTE_WORK"
"""Environment variable: the folder of working copies."""
PATIENCE_VARIABLE = "JAXDIST_REMOTE_PATIENCE"
"""Environment variable: for how many seconds the last upload is tried."""
_PATIENCE_SECONDS = 600.0
ADDRESS_VARIABLE = "JAXDIST_RUN_ADDRESS"
"""Environment variable, set here for the processes of a job: the address that their run directory is a copy of."""
_RUN, _JOBS, _FETCHED, _PROBE = "run", "jobs", "fetched", "probe"
_SLOW_SECONDS = 5.0

Ending: TypeAlias = Callable[[], contextlib.AbstractContextManager[object]]
"""Yields what is true once the user has asked to end the last upload."""


class NotUploadedError(errors.RunFailedError):
    """A run ended, and not all of it could be uploaded; the message says where it is."""


class UnfinishedUploadError(errors.UserError):
    """A run for the address was never uploaded; the message says where on this machine it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HowToBegin:
    """What was asked for: to resume, to resume if there is a run, to replace one, from which checkpoint."""

    resume: bool = False
    restartable: bool = False
    overwrite: bool = False
    checkpoint: int | None = None


@contextlib.contextmanager
def opened(
    address: Address, how: HowToBegin, *, purpose: str, ending: Ending = contextlib.nullcontext
) -> Iterator[pathlib.Path]:
    """Yield the run directory to train in; what is written there is uploaded, all of it before the context ends.

    `purpose` is shown to a job that is refused; `ending` is entered while the last files are uploaded.

    Raises:
      UserError: the remote directory cannot be used so; what the context raised, with the address for its path.
      NotUploadedError: not everything could be uploaded.
    """
    store = run_store.open_store(address)
    folder = folder_of(address)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_named(address, folder))
        stack.enter_context(lock.locked(folder, purpose=purpose))
        stack.callback(_remove_empty, folder)
        with fetching.reading(store):
            start = _Start.find(store, folder)
            start.check(how, folder)
            store.check_writable(_PROBE)
            waits = how.resume or how.restartable
            held = job_object.take(store, purpose, waits=waits, say=full_disk.say)
        stack.callback(held.release)
        with _removed_if_new(folder), fetching.reading(store):
            known = _prepare(store, folder, start, how)
            _note_job(store, folder, held.owner.job)
        replaces = how.overwrite and start.is_remote
        copy = mirror.Mirror(folder / _RUN, store, lock=held, known=known, replaces=replaces)
        stack.enter_context(_told_to_processes(address))
        copy.start()
        try:
            yield folder / _RUN
        except BaseException as error:
            # The error is what the user has to see; what was trained until then is uploaded, too.
            try:
                _finish(copy, address, folder, ending)
            except NotUploadedError as second:
                full_disk.say(str(second))
            raise error
        _finish(copy, address, folder, ending)


def folder_of(address: Address) -> pathlib.Path:
    """Return the folder of the working copy of a remote run directory on this machine."""
    root = os.environ.get(FOLDER_VARIABLE) or files.cache_folder() / "remote"
    return pathlib.Path(root).absolute() / address.folder_name


def shown(run_dir: pathlib.Path) -> str:
    """Return the name of a run directory for the user: the address, if it is a working copy of this job."""
    text = os.environ.get(ADDRESS_VARIABLE)
    is_copy = text and run_dir.absolute() == folder_of(Address(text)) / _RUN
    return str(text) if is_copy else str(run_dir)


@contextlib.contextmanager
def _told_to_processes(address: Address) -> Iterator[None]:
    os.environ[ADDRESS_VARIABLE] = str(address)
    try:
        yield
    finally:
        os.environ.pop(ADDRESS_VARIABLE, None)


@dataclasses.dataclass(frozen=True)
class _Start:
    """What there is before a job: a remote run, a working copy, and whether that is at least as new."""

    is_remote: bool
    is_local: bool
    is_newest: bool
    address: Address

    @classmethod
    def find(cls, store: run_store.RunStore, folder: pathlib.Path) -> "_Start":
        last = store.read(job_object.LAST_JOB)
        is_remote, is_local = fetching.holds_run(store), (folder / _RUN / mirror.RECORD).exists()
        same = last is not None and last.decode(errors="replace") in _jobs(folder)
        return cls(is_remote, is_local, is_local and (same or not is_remote), store.address)

    def check(self, how: HowToBegin, folder: pathlib.Path) -> None:
        """Raise UserError where a run may not begin so."""
        if how.resume and not (self.is_remote or self.is_newest):
            raise errors.UserError(
                f"--resume needs a run to continue; {self.address} holds none. Leave --resume out to start one."
            )
        if how.resume or how.restartable or how.overwrite:
            return
        if self.is_remote:
            raise errors.UserError(
                f"{self.address} already holds a run. Continue it with --resume, replace it with --overwrite, or "
                "choose another --run-dir."
            )
        if self.is_local:
            raise UnfinishedUploadError(
                f"A run for {self.address} that was never uploaded is in {folder / _RUN}. Continue it with --resume, "
                "replace it with --overwrite, or choose another --run-dir."
            )


def _prepare(
    store: run_store.RunStore, folder: pathlib.Path, start: _Start, how: HowToBegin
) -> dict[str, mirror.Signature]:
    """Make the working copy what the run begins with; return its files that are the same in the store."""
    run_dir, fetched = folder / _RUN, folder / _FETCHED
    shutil.rmtree(fetched, ignore_errors=True)
    continues = how.resume or (how.restartable and (start.is_remote or start.is_newest))
    if not continues:
        shutil.rmtree(run_dir, ignore_errors=True)
        return {}
    choose = fetching.newest_and_best if how.checkpoint is None else fetching.since(how.checkpoint)
    if start.is_newest:
        if how.checkpoint is not None and start.is_remote:
            fetching.fetch_checkpoints(store, run_dir, choose)
        full_disk.say(f"What this machine has of {store.address} is continued, in {run_dir}.")
        return {}
    _set_aside(run_dir, store.address)
    known = fetching.fetch_files(store, fetched)
    fetching.fetch_checkpoints(store, fetched, choose)
    fetched.rename(run_dir)  # a run that is half fetched is none
    return known


def _set_aside(run_dir: pathlib.Path, address: Address) -> None:
    """Move a working copy away that another machine's job has made obsolete."""
    if not (run_dir / mirror.RECORD).exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        return
    number = 1
    while (aside := run_dir.with_name(f"{_RUN}-obsolete-{number}")).exists():
        number += 1
    run_dir.rename(aside)
    full_disk.say(
        f"Another job continued {address} since this machine did; what this one had not uploaded is in {aside}."
    )


def _finish(copy: mirror.Mirror, address: Address, folder: pathlib.Path, ending: Ending) -> None:
    """Upload the rest, and remove the working copy.

    Raises:
      NotUploadedError: something is left.
    """
    patience = float(os.environ.get(PATIENCE_VARIABLE) or _PATIENCE_SECONDS)
    slow = threading.Timer(_SLOW_SECONDS, full_disk.say, [f"Uploading the rest of the run to {address}."])
    slow.daemon = True
    slow.start()
    try:
        with ending() as request:
            whole = copy.finish(patience_seconds=patience, stopped=lambda: bool(request))
    finally:
        slow.cancel()
    where = folder / _RUN
    if not whole:
        why = copy.error or "there was no time"
        advice = "" if isinstance(copy.error, mirror.LostError) else " --resume on this machine uploads it."
        raise NotUploadedError(f"Not all of the run is in {address}: {why}. It is whole in {where}.{advice}")
    if copy.replaces and where.exists():
        full_disk.say(f"The run saved no checkpoint, so {address} still holds the earlier one. The new is in {where}.")
        return
    _remove(folder)


def _remove(folder: pathlib.Path) -> None:
    """Remove a working copy, but not what was set aside beside it."""
    for name in (_RUN, _JOBS, _FETCHED):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _remove_empty(folder: pathlib.Path) -> None:
    if [path.name for path in folder.iterdir()] == [lock.FILE_NAME]:
        shutil.rmtree(folder)


def _jobs(folder: pathlib.Path) -> list[str]:
    path = folder / _JOBS
    return path.read_text().split() if path.exists() else []


def _note_job(store: run_store.RunStore, folder: pathlib.Path, job: str) -> None:
    """Note the job on both sides: here first and beside the one before, so that at no moment the two disagree."""
    files.write_text(folder / _JOBS, "\n".join([*_jobs(folder)[-1:], job]))
    store.write(job_object.LAST_JOB, job.encode())


@contextlib.contextmanager
def _removed_if_new(folder: pathlib.Path) -> Iterator[None]:
    """Remove the working copy if it did not exist before and the context fails: half of a run is none."""
    existed = (folder / _RUN / mirror.RECORD).exists()
    try:
        yield
    except BaseException:
        if not existed:
            _remove(folder)
        raise


@contextlib.contextmanager
def _named(address: Address, folder: pathlib.Path) -> Iterator[None]:
    """Let messages name the address, but for those that say where the working copy is."""
    told: BaseException | None = None
    with fetching.named_as(address, folder / _RUN, folder):
        try:
            yield
        except (NotUploadedError, UnfinishedUploadError) as error:
            told = error
    if told is not None:
        raise told

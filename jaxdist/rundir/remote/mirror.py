"""The mirror of a run directory: uploads what a run writes on this machine, while it runs.

A checkpoint goes up file by file; the object that says that it is whole is written last (see `uploads`), and removed
first when the run removes the checkpoint. Other files are replaced as they change, the run record after all others.
A storage that fails delays this and never ends the run: what is missing is uploaded when it answers again.
"""

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxdist.checkpoint import step_names
from jaxdist.rundir import full_disk
from jaxdist.rundir import lock as local_lock
from jaxdist.rundir.remote import job_object, uploads
from jaxdist.rundir.remote.run_store import RunStore, StoreError

RECORD = "run.json"
_NOT_MIRRORED = {local_lock.FILE_NAME, job_object.NAME, "board", "replaced"}
"""Files and folders of a run directory that concern this machine alone."""
_LOOK_SECONDS, _FILES_SECONDS = 1.0, 15.0
"""Seconds between two looks for a new checkpoint, and between two uploads of files that grow."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0

Signature = tuple[int, int]
"""Bytes of a file, and when it was changed."""


class LostError(Exception):
    """Another job has taken the remote run directory over."""


class Mirror:
    """Uploads a run directory; `once` makes one pass, `start` and `finish` run it beside a run.

    `lock` is that of the store, None if nothing else writes there. `known` are the files that are the same on both
    sides, with their `signatures`. `replaces` is whether a run in the store is to be replaced, once this one has saved
    a checkpoint.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        store: RunStore,
        *,
        lock: job_object.RemoteLock | None = None,
        known: Mapping[str, Signature] | None = None,
        replaces: bool = False,
    ):
        self._run_dir, self._store, self._lock = run_dir, store, lock
        self._known = dict(known or {})
        self.replaces = replaces
        """Whether the store still holds the run that this one is to replace."""
        self._uploaded: set[str] | None = None  # names of the checkpoints that the store holds whole
        self._ours: set[str] = set()  # those of them that are, or were, on this machine
        self._passing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="jaxdist-mirror", daemon=True)
        self._told = ""
        self.error: Exception | None = None
        """Why the last pass failed; None if it did not."""

    def start(self) -> None:
        """Upload in a thread from now on."""
        self._thread.start()

    def finish(self, *, patience_seconds: float, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Upload all that is left, for so long at most or until `stopped`; return whether everything is uploaded."""
        self._ended.set()
        deadline, pause = time.monotonic() + patience_seconds, _FIRST_PAUSE_SECONDS
        done, whole = threading.Event(), False

        def upload() -> None:
            nonlocal pause, whole
            while not self._try(files=True) and not self._is_lost():
                if done.wait(min(pause, max(0.0, deadline - time.monotonic()))) or time.monotonic() >= deadline:
                    return
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            whole = self.error is None

        # In a thread, because a storage that hangs does not see a signal.
        last = threading.Thread(target=upload, name="jaxdist-last-upload", daemon=True)
        last.start()
        while last.is_alive() and time.monotonic() < deadline and not stopped():
            last.join(0.05)
        done.set()
        return whole

    def once(self, *, files: bool = True) -> None:
        """Make one pass; with `files` not of checkpoints alone.

        Raises:
          StoreError: the storage failed; the next pass continues.
          LostError: another job has the remote run directory.
        """
        with self._passing, self._looking_again_after_errors():
            if self._lock is not None and not self._lock.is_ours():
                self._raise_lost()
            local = self._local_checkpoints()
            if self.replaces and local:
                self._remove_replaced()
            if self.replaces or not (self._run_dir / RECORD).exists():
                return
            known = self._find_uploaded()
            self._ours |= local.keys()
            new = False
            for name in sorted(local.keys() - known, key=uploads.order):
                new |= self._upload_checkpoint(local[name])
            if files or new:
                self._upload_files()
            self._remove_checkpoints(local.keys())

    @contextlib.contextmanager
    def _looking_again_after_errors(self) -> Iterator[None]:
        """Ask the store what it holds after an error, which may leave half a checkpoint there."""
        try:
            yield
        except BaseException:
            self._uploaded = None
            raise

    def _follow(self) -> None:
        pause, files_at = 0.0, -float("inf")
        while not self._ended.wait(pause or _LOOK_SECONDS):
            due = time.monotonic() - files_at >= _FILES_SECONDS
            if self._try(files=due):
                pause, files_at = 0.0, time.monotonic() if due else files_at
            elif self._is_lost():
                return
            else:
                pause = min(2 * pause or _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)

    def _try(self, *, files: bool) -> bool:
        """Make one pass; return whether it succeeded. A failure is said once."""
        try:
            self.once(files=files)
        except (OSError, LostError) as error:
            self.error = error
            self._tell(error)
            return False
        if self._told:
            full_disk.say(f"{self._store.address} can be written again.")
        self.error, self._told = None, ""
        return True

    def _is_lost(self) -> bool:
        return isinstance(self.error, LostError)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            then = "" if isinstance(error, LostError) else " The run continues, and uploads what is missing later."
            full_disk.say(f"{self._store.address}: {error}{then}")
        self._told = str(error)

    def _raise_lost(self) -> None:
        assert self._lock is not None
        assert self._lock.lost_to is not None
        raise LostError(
            f"another job has taken this run directory over: {job_object.describe(self._lock.lost_to)}. Nothing is "
            f"uploaded any more; the run continues in {self._run_dir}."
        )

    def _local_checkpoints(self) -> dict[str, pathlib.Path]:
        committed = step_names.committed(self._run_dir / step_names.FOLDER_NAME)
        return {paths[-1].name: paths[-1] for paths in committed.values()}

    def _find_uploaded(self) -> set[str]:
        if self._uploaded is None:
            self._uploaded = uploaded_names(self._store)
            self._remove_torn(self._uploaded)
        return self._uploaded

    def _remove_torn(self, whole: set[str]) -> None:
        """Remove what an interrupted upload left, of checkpoints that are not on this machine any more."""
        kept = whole | self._local_checkpoints().keys()
        for file in self._store.sizes(step_names.FOLDER_NAME):
            name = file.split("/")[1]
            if step_names.parse(name) and name not in kept:
                self._store.remove(file)

    def _remove_replaced(self) -> None:
        """Remove the run that is replaced, the objects that say that its checkpoints are whole first."""
        names = self._store.sizes()
        for name in sorted(names, key=lambda name: (uploads.checkpoint_of(name) is None, name != RECORD)):
            if name not in (job_object.NAME, job_object.LAST_JOB):
                self._store.remove(name)
        self.replaces = False

    def _upload_checkpoint(self, path: pathlib.Path) -> bool:
        """Upload a checkpoint; return False if the run removed it meanwhile."""
        try:
            made = uploads.UploadedCheckpoint.of(path)
            paths = {f"{made.folder}/{name}": path / name for name in made.files}
            self._store.upload(paths)
        except OSError:
            if path.exists():
                raise
            remove_checkpoint(self._store, path.name)
            return False
        there = self._store.sizes(made.folder)
        missing = [name for name, (size, _) in made.files.items() if there.get(f"{made.folder}/{name}") != size]
        if missing:
            raise StoreError(f"could not upload {made.folder}/{missing[0]}: the storage does not hold all of it")
        if self._lock is not None and not self._lock.is_ours():
            self._raise_lost()
        self._store.write(uploads.object_name(made.name), made.to_bytes())
        self._find_uploaded().add(made.name)
        return True

    def _upload_files(self) -> None:
        now = signatures(self._run_dir)
        changed = [name for name, signature in now.items() if self._known.get(name) != signature]
        others = [name for name in changed if name != RECORD]
        for names in (others, [name for name in changed if name == RECORD]):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # removed since
                    self._store.write(name, (self._run_dir / name).read_bytes())
                    self._known[name] = now[name]
        for name in self._known.keys() - now.keys():
            self._store.remove(name)
            del self._known[name]

    def _remove_checkpoints(self, local: Any) -> None:
        """Remove what the run has removed, and older checkpoints of earlier jobs that are kept no longer."""
        known = self._find_uploaded()
        if not local or not known & set(local):
            return  # what is here is not uploaded yet, so nothing that is there may go
        settings, best = kept_by_record(self._run_dir)
        gone = (known & self._ours) - set(local)
        older = uploads.superfluous(known - self._ours, kept=set(local), best=best, **settings)
        for name in sorted(gone | older, key=uploads.order):
            remove_checkpoint(self._store, name)
            known.discard(name)


def uploaded_names(store: RunStore) -> set[str]:
    """Return the checkpoints that a store holds whole, by the names of their directories."""
    found = map(uploads.checkpoint_of, store.sizes(uploads.FOLDER))
    return {name for name in found if name is not None}


def remove_checkpoint(store: RunStore, name: str) -> None:
    """Remove a checkpoint from a store: from the first moment it is whole no longer."""
    store.remove(uploads.object_name(name))
    for file in store.sizes(f"{step_names.FOLDER_NAME}/{name}"):
        store.remove(file)


def signatures(run_dir: pathlib.Path) -> dict[str, Signature]:
    """Return the files of a run directory that are mirrored one by one: all but those of checkpoints."""
    found: dict[str, Signature] = {}
    for path in run_dir.rglob("*"):
        parts = path.relative_to(run_dir).parts
        inner = parts[0] == step_names.FOLDER_NAME or parts[0] in _NOT_MIRRORED
        if inner or path.name.endswith(".tmp") or parts[0].startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                state = path.stat()
                found["/".join(parts)] = state.st_size, state.st_mtime_ns
    return found


def kept_by_record(run_dir: pathlib.Path) -> tuple[dict[str, Any], int | None]:
    """Return which checkpoints the run record says are kept, and the best step; without a record all are."""
    try:
        found = json.loads((run_dir / RECORD).read_bytes())
        kept, best = found["config"]["checkpoints"], found.get("best") or {}
        return {"keep_last": kept["keep_last"], "keep_every": kept["keep_every"]}, best.get("step")
    except (OSError, ValueError, KeyError, TypeError):
        return {"keep_last": 1, "keep_every": 1}, None

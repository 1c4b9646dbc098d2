"""The lock of a remote run directory: an object that its job renews, for object stores have no locks.

The object names the job. While the job lives it renews the object, and removes it at its end. A job that was killed
leaves it behind: an object that is not renewed for STALE_SECONDS, watched by one who wants the directory, is taken
over. What is compared is the content alone, so clocks of machines may differ. A job that finds another's object in
place of its own has lost the directory, and writes there no more.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable

from jaxdist.rundir.lock import LockedError
from jaxdist.rundir.remote.run_store import RunStore, StoreError

NAME = "lock.json"
LAST_JOB = "last_job"
"""The object that says which job wrote to the directory last."""
RENEW_SECONDS, STALE_SECONDS = 15.0, 90.0
_LONG_AGO = datetime.timedelta(hours=6)
"""No clock is that wrong: an object that is older belongs to no living job."""
QUIET = datetime.timedelta(minutes=10)
"""The same for lists of runs, where a mistake costs nothing."""
_LOOK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class JobOwner:
    """Who holds a remote run directory.

    Attributes:
      job: identifies the job; no other has it.
      process: its process.
      host: its machine, by name.
      machine: what no other machine has, and changes when it starts anew; "" if that is unknown.
      purpose: its command line.
      renewed: when it renewed the lock, ISO 8601.
      count: how often it renewed it.
    """

    job: str
    process: int
    host: str
    machine: str
    purpose: str
    renewed: str
    count: int = 0

    @classmethod
    def this(cls, purpose: str) -> "JobOwner":
        """Return a new job in this process."""
        now = _now().isoformat(timespec="seconds")
        return cls(uuid.uuid4().hex, os.getpid(), socket.gethostname(), _machine(), purpose, now)

    def renewed_now(self) -> "JobOwner":
        """Return the owner with the present time."""
        return dataclasses.replace(self, renewed=_now().isoformat(timespec="seconds"), count=self.count + 1)

    def to_bytes(self) -> bytes:
        """Return the content of the object."""
        return json.dumps(dataclasses.asdict(self)).encode()

    def is_dead(self, after: datetime.timedelta = _LONG_AGO) -> bool:
        """Return whether the job has ended: a process of this machine that is no more, or not renewed for so long."""
        if self.machine and self.machine == _machine() and not _is_process(self.process):
            return True
        with contextlib.suppress(ValueError):
            return _now() - datetime.datetime.fromisoformat(self.renewed) > after
        return False


def owner_of(store: RunStore, folder: str = "") -> JobOwner | None:
    """Return who holds the directory, or a folder in it; None if it is free. Raises StoreError."""
    content = store.read(f"{folder}/{NAME}" if folder else NAME)
    if content is None:
        return None
    try:
        return JobOwner(**json.loads(content))
    except (ValueError, TypeError):
        return _nobody("its lock cannot be read")


class RemoteLock:
    """Holds the lock of a remote run directory, and renews it in a thread, until it is released."""

    def __init__(self, store: RunStore, owner: JobOwner):
        self.owner, self._store = owner, store
        self.lost_to: JobOwner | None = None
        """The job that took the directory over; None while it is ours."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="jaxdist-remote-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing, and remove the object if it is still ours."""
        self._ended.set()
        self._thread.join(RENEW_SECONDS)
        with contextlib.suppress(StoreError):  # then it becomes stale
            if self.is_ours():
                self._store.remove(NAME)

    def is_ours(self) -> bool:
        """Return whether the object names this job, and note who else holds the directory; raises StoreError."""
        # An object that is gone was removed by hand, or by a job that took over and has ended since.
        found = owner_of(self._store) or _nobody("it has ended, or its lock was removed")
        if found.job != self.owner.job:
            self.lost_to = found
        return self.lost_to is None

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(StoreError):  # the next renewal may succeed
                if self.is_ours():
                    self.owner = self.owner.renewed_now()
                    self._store.write(NAME, self.owner.to_bytes())
            if self.lost_to is not None:
                return


def take(
    store: RunStore,
    purpose: str,
    *,
    waits: bool,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> RemoteLock:
    """Return the lock of a remote run directory, held.

    `purpose` is shown to a job that is refused. Where it `waits`, a lock of a job that may have been killed is watched
    until it is stale, in place of refusing.

    Raises:
      LockedError: a job holds it; the message names it.
      StoreError: the storage does not answer.
    """
    ours = JobOwner.this(purpose)
    while not store.create(NAME, ours.to_bytes()):
        found = owner_of(store)
        if found is None:
            continue
        if not (found.is_dead() or (waits and _is_stale(store, found, say, sleep))):
            raise _refusal(store, found)
        store.remove(NAME)
    # Where the store cannot create exclusively, the last of two jobs that begin at once is in the object.
    found = owner_of(store)
    if found is not None and found.job != ours.job:
        raise _refusal(store, found)
    return RemoteLock(store, ours)


def _is_stale(store: RunStore, found: JobOwner, say: Callable[[str], None], sleep: Callable[[float], None]) -> bool:
    """Return whether the lock stays as it is for STALE_SECONDS."""
    say(
        f"{store.address} is locked by {describe(found)}, which may have been killed. Waiting up to "
        f"{STALE_SECONDS:.0f} s to see whether it lives."
    )
    for _ in range(int(STALE_SECONDS / _LOOK_SECONDS)):
        sleep(_LOOK_SECONDS)
        now = owner_of(store)
        if now is None or now != found:
            return now is None
    return True


def _refusal(store: RunStore, owner: JobOwner) -> LockedError:
    return LockedError(
        f"One job at a time may work in {store.address}; {describe(owner)} does, and renewed its lock at "
        f"{owner.renewed}. Wait for it, end it, or choose another directory. If it was killed on another machine, "
        f"--resume takes over what is not renewed for {STALE_SECONDS:.0f} s."
    )


def describe(owner: JobOwner) -> str:
    """Return who an owner is, for a message."""
    return f"process {owner.process} on {owner.host} ({owner.purpose})"


def _nobody(why: str) -> JobOwner:
    return JobOwner("", 0, "an unknown host", "", why, _now().isoformat(timespec="seconds"))


def _machine() -> str:
    """Return what identifies this machine since it was started, and the processes that are seen from here."""
    try:
        return (
            f"{pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        )
    except OSError:
        return ""


def _is_process(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)

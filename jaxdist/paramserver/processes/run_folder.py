"""The folder of a parameter-server run, `ps` in its run directory: the names of its files, and the Spec in it."""

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from jaxdist.paramserver.processes.process_world import write_file
from jaxdist.paramserver.protocol.settings import Settings, Timers
from jaxdist.rundir import full_disk
from jaxdist.spmd.canonical import thread_pool

DIRECTORY_NAME, STATISTICS_NAME = "ps", "statistics"
"""The folder of the processes in a run directory; the folder of their counters in it."""
NONFINITE_NAME = "nonfinite"
"""The folder with the reports of workers on gradients that are not finite."""
STEPS_NAME, LOG_NAME, SPEC_NAME = "steps.jsonl", "scheduler.log", "spec.json"
ADDRESSES_NAME = "addresses"
"""The folder with the addresses of processes that came or moved after the start (see `peer_addresses`)."""
HISTORY_NAME = "history"
"""The folder with what each process did when (see `lease_history`)."""
SILENT_NAME = "silent"
"""The folder with one file for each process that does not answer, for its crew."""


def silent_path(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Return the file whose existence asks the crew of process `name` to restart it."""
    return directory / SILENT_NAME / name.replace("/", "-")


def take_silent(directory: pathlib.Path, name: str) -> bool:
    """Return whether the crew is asked to restart process `name`, and remove the request."""
    path = silent_path(directory, name)
    if not path.exists():
        return False
    path.unlink()
    return True


BOOTS_NAME = "boots"
"""The folder with the last boot number of each process."""
BOOT_ROOM = 1_000_000
"""Space between boot numbers: a process that rejoins without a restart adds one to its own."""


_OF_ATTEMPT = (
    STEPS_NAME,
    LOG_NAME,
    SPEC_NAME,
    STATISTICS_NAME,
    NONFINITE_NAME,
    ADDRESSES_NAME,
    HISTORY_NAME,
    SILENT_NAME,
    BOOTS_NAME,
)


def remove_earlier(directory: pathlib.Path) -> None:
    """Remove what the processes of an earlier attempt wrote for each other, whatever it has become since."""
    for path in (directory / name for name in _OF_ATTEMPT):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def newer_boot(wall: int, before: int) -> int:
    """Return a boot number for a process that starts at the wall clock `wall` (ns): larger than `before`, its last."""
    return max(wall, before + BOOT_ROOM)


def next_boot(directory: pathlib.Path, name: str) -> int:
    """Return the boot number of a process that starts: larger than all earlier ones, even if the clock was set back."""
    path = directory / BOOTS_NAME / name.replace("/", "-")
    before = int(path.read_text()) if path.exists() else 0
    boot = newer_boot(time.time_ns(), before)
    full_disk.until_written(lambda: write_file(path, [str(boot).encode()]), str(path))
    return boot


def last_boot(directory: pathlib.Path, name: str) -> int:
    """Return the largest boot number that the process `name` can have had until now."""
    path = directory / BOOTS_NAME / name.replace("/", "-")
    return int(path.read_text()) + BOOT_ROOM - 1 if path.exists() else 0


def clock_of_machine() -> tuple[str, float]:
    """Return what identifies this machine since its start, and what turns its monotonic clock into seconds since 1970.

    The second is of now: when the machine's clock is set later, times that are made from it are not moved.
    """
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else "", time.time() - time.monotonic()


@dataclasses.dataclass(frozen=True)
class Spec:
    """What every process of a run needs to know.

    Attributes:
      attempt: random name of this attempt; see Security.for_attempt.
      experiment: path of the experiment file.
      assignments: overrides of the experiment, as on the command line, secrets hidden (see `hidden_settings`).
      settings: all settings of the protocol.
      peers: process name -> `host:port`.
      directory: folder of the run, for logs and saved cuts.
      resume: name of the saved cut to start from; empty for a new run.
      devices: devices of each worker.
      kind: how the optimizer runs on shards (see `optimizer_kind`).
      data: fingerprint of the training data, for workers that join later; empty if it is not compared.
      door: where processes that join connect to: the name of a socket of this machine, and `host:port` or "".
      ledger: whether the scheduler records the examples of each step (`rundir.ledger`).
      threads: XLA's threads of each process on CPU devices, which decide bits.
      clock: `clock_of_machine` of the observer's machine when the attempt began.
    """

    attempt: str
    experiment: str
    assignments: list[str]
    settings: dict[str, Any]
    peers: dict[str, str]
    directory: str
    resume: str
    devices: int
    kind: str
    data: str = ""
    door: tuple[str, str] = ("", "")
    ledger: bool = False
    threads: int = thread_pool.LEAST
    clock: tuple[str, float] = ("", 0.0)

    def write(self, path: pathlib.Path) -> None:
        """Write this Spec to a file."""
        write_file(path, [json.dumps(dataclasses.asdict(self)).encode()])

    @classmethod
    def read(cls, path: pathlib.Path) -> "Spec":
        """Return the Spec that `write` wrote."""
        return cls.of(json.loads(path.read_text()))

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Spec":
        """Return the Spec with these fields, as JSON has them."""
        pairs: dict[str, Any] = {name: tuple(content[name]) for name in ("door", "clock") if name in content}
        return cls(**content | pairs)

    def make_clock(self) -> Callable[[], float]:
        """Return a clock of seconds since 1970: one for all processes of the observer's machine, also after a restart.

        A clock that counts on from when the attempt began does not jump when that of the machine is set.
        """
        here, offset = clock_of_machine()
        if here == self.clock[0]:
            offset = self.clock[1]
        return lambda: time.monotonic() + offset

    def make_settings(self) -> Settings:
        """Return the settings of the protocol."""
        fields = dict(self.settings)
        fields["timers"] = Timers(**fields["timers"])
        fields |= {name: tuple(fields[name]) for name in ("read_every", "hosts")}
        return Settings(**fields)

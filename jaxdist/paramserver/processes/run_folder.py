"""The folder of a parameter-server run, `ps` in its run directory: what is stored there, and the Spec in it."""

import dataclasses
import json
import pathlib
import time
from typing import Any

from jaxdist.paramserver.processes.driver import write_file
from jaxdist.paramserver.protocol.settings import Settings, Timers

OBSERVER = "observer"
DIRECTORY_NAME, STATISTICS_NAME = "ps", "statistics"
"""The run's own folder in a run directory; the counters in it."""
NONFINITE_NAME = "nonfinite"
"""The folder with what workers found out about gradients that are not finite."""
STEPS_NAME, CUT_NAME, LOG_NAME, SPEC_NAME = "steps.jsonl", "cut", "scheduler.log", "spec.json"
SILENT_NAME = "silent"
"""The folder that names processes which do not answer, for the crews that keep them."""


def silent_path(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Return the file whose existence asks the crew of process `name` to end it and start it again."""
    return directory / SILENT_NAME / name.replace("/", "-")


def take_silent(directory: pathlib.Path, name: str) -> bool:
    """Return whether process `name` has to be ended because it does not answer; True once."""
    path = silent_path(directory, name)
    if not path.exists():
        return False
    path.unlink()
    return True


BOOTS_NAME = "boots"
"""The folder with the last boot number of each process."""
_BOOT_ROOM = 1_000_000
"""A process that joins again without a restart adds one to its boot number."""


def next_boot(directory: pathlib.Path, name: str) -> int:
    """Return the boot number of a process that starts: larger than all before it, even if the clock was set back."""
    path = directory / BOOTS_NAME / name.replace("/", "-")
    before = int(path.read_text()) if path.exists() else 0
    boot = max(time.time_ns(), before + _BOOT_ROOM)
    write_file(path, [str(boot).encode()])
    return boot


@dataclasses.dataclass(frozen=True)
class Spec:
    """What every process of a run knows.

    Attributes:
      attempt: random name of this attempt at the run; see Security.for_attempt.
      experiment: path of the experiment file.
      assignments: overrides of it, as on the command line.
      settings: all settings of the protocol.
      peers: process name -> `host:port`.
      directory: the run's own folder for logs, snapshots and cuts.
      resume: name of the snapshot to start from; empty for a fresh run.
      devices: devices of each worker.
      kind: how the optimizer runs on shards (see `optimizer_kind`).
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

    def write(self, path: pathlib.Path) -> None:
        """Write the file that `read` reads."""
        write_file(path, [json.dumps(dataclasses.asdict(self)).encode()])

    @classmethod
    def read(cls, path: pathlib.Path) -> "Spec":
        """Return the Spec in a file."""
        return cls(**json.loads(path.read_text()))

    def make_settings(self) -> Settings:
        """Return the protocol's settings."""
        fields = dict(self.settings)
        fields["timers"] = Timers(**fields["timers"])
        fields |= {name: tuple(fields[name]) for name in ("read_every", "hosts")}
        return Settings(**fields)

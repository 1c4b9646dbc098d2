"""The processes of a parameter-server run on this machine: started, restarted when they die, ended with the run."""

import os
import pathlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxdist.errors import RunFailedError
from jaxdist.launch import parent
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.protocol.settings import SCHEDULER, server_shard
from jaxdist.paramserver.wire import security

MOST_DEATHS = 5
"""A process that dies so often without a step in between will not do better the next time."""
GRACE_SECONDS = 5.0
LOG_TAIL_LINES = 20
_LOOK_SECONDS = 0.05


class Crew(Protocol):
    """Whoever keeps the processes of a run alive: this machine, or the engine of a cluster."""

    @property
    def restarts(self) -> int:
        """Starts of a process beyond its first."""
        ...

    def start(self) -> None:
        """Start all processes."""
        ...

    def look_after(self) -> None:
        """Restart what died; raises RunFailedError for what dies again and again, or for a scheduler that gave up."""
        ...

    def progressed(self) -> None:
        """Take note that the run got on: deaths are counted from here."""
        ...

    def close(self, *, orderly: bool) -> None:
        """End all processes; `orderly` gives them time to end by themselves."""
        ...


class LocalCrew:
    """Processes of this machine.

    Args:
      names: which parts they play.
      directory: the run's own folder, where the file `run_folder.SPEC_NAME` is and their logs go.
      token: the secret of the run.
    """

    def __init__(self, names: Sequence[str], directory: pathlib.Path, token: str) -> None:
        self.names, self.directory, self._token = list(names), directory, token
        self.restarts = 0
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._deaths: Counter[str] = Counter()

    def start(self) -> None:
        """Start all processes."""
        for name in self.names:
            self._start(name)

    def _start(self, name: str) -> None:
        log = log_path(self.directory, name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._children[name] = subprocess.Popen(
                command(name, self.directory),
                env={**os.environ, **environment(name, self._token)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def look_after(self) -> None:
        """Restart what died; raises RunFailedError for what dies again and again, or for a scheduler that gave up."""
        for name, child in list(self._children.items()):
            status = child.poll()
            if status is None or (status == 0 and name != SCHEDULER):
                continue  # alive, or it heard of the end before we did
            if status == 0:
                raise RunFailedError(f"the scheduler ended the run.\n{log_tail(self.directory, name)}")
            self._deaths[name] += 1
            if self._deaths[name] > MOST_DEATHS:
                tail = log_tail(self.directory, name)
                raise RunFailedError(f"{name} died {self._deaths[name]} times without a step in between.\n{tail}")
            self.restarts += 1
            self._start(name)

    def all_ended(self) -> bool:
        """Return True when no process is left."""
        return all(child.poll() is not None for child in self._children.values())

    def progressed(self) -> None:
        """Take note that the run got on: deaths are counted from here."""
        self._deaths.clear()

    def close(self, *, orderly: bool) -> None:
        """End all processes; `orderly` gives them time to end by themselves."""
        deadline = time.monotonic() + (GRACE_SECONDS if orderly else 0.0)
        while time.monotonic() < deadline and not self.all_ended():
            time.sleep(_LOOK_SECONDS)
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
            child.wait()


def command(name: str, directory: pathlib.Path) -> list[str]:
    """Return the command line of the process that plays the part `name`."""
    module = "processes.scheduler_process" if name == SCHEDULER else "run.jax_process"
    spec = str(directory / run_folder.SPEC_NAME)
    return [sys.executable, "-m", f"jaxdist.paramserver.{module}", name, spec]


def environment(name: str, token: str) -> Mapping[str, str]:
    """Return what is set for the process that plays the part `name`, which is a child of this one."""
    shared = {security.TOKEN: token, parent.PARENT_ID: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    # A server keeps its shard in the host's memory; the accelerators are the workers'.
    return shared | ({"JAX_PLATFORMS": "cpu"} if server_shard(name) is not None else {})


def log_path(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Return where the output of a process goes."""
    return directory / "logs" / f"{name.replace('/', '-')}.log"


def log_tail(directory: pathlib.Path, name: str) -> str:
    """Return the last lines of a process's log."""
    path = log_path(directory, name)
    return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]) if path.exists() else ""

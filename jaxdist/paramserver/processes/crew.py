"""Starts the processes of a parameter-server run on this machine, restarts those that die, and ends them."""

import os
import pathlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxdist.errors import ExitStatus, RunFailedError, say
from jaxdist.launch import parent
from jaxdist.launch.supervising import local_job, stopped
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.processes.role import LEFT_STATUS
from jaxdist.paramserver.protocol.settings import SCHEDULER, server_shard, worker_number
from jaxdist.paramserver.wire import security

MOST_DEATHS = 5
"""A process that dies more often than this without a step in between is not restarted again."""
GRACE_SECONDS = 5.0
_REPEAT_SECONDS = 1.0
LOG_TAIL_LINES = 20
_LOOK_SECONDS = 0.05
_GPUS = "CUDA_VISIBLE_DEVICES"
STOPPED_SECONDS = 30.0
"""How long a process may be stopped (SIGSTOP) before it is restarted: it does not continue by itself."""
_MOST_PASSED = 1.0
"""Time that counts between two looks at a process: if this one was stopped, too, both are about to continue."""
_EARLY_SECONDS = 10.0
"""A process exits with 0 at the end of the run; the observer knows of the end much sooner than this."""


class Crew(Protocol):
    """Keeps the processes of a run alive: on this machine, or through the engine of a cluster."""

    @property
    def names(self) -> list[str]:
        """The processes that it keeps alive."""

    @property
    def restarts(self) -> int:
        """How many times processes were restarted."""

    def start(self) -> None:
        """Start all processes."""

    def look_after(self) -> dict[str, int]:
        """Restart processes that died; return their names, and the largest boot number that each had.

        Raises RunFailedError for a process that dies repeatedly, or if the scheduler ended.
        """

    def progressed(self) -> None:
        """Note that the run made progress: deaths are counted from zero again."""

    def retire(self, names: Sequence[str]) -> None:
        """Have workers leave the run after their step; see `take_left`."""

    def take_left(self) -> list[str]:
        """Return the workers that have left since the last call."""

    def close(self, *, orderly: bool) -> None:
        """End all processes; `orderly` gives them time to exit by themselves."""


class LocalCrew:
    """Processes of this machine.

    `directory` is the folder of the run, with the file `run_folder.SPEC_NAME` and the logs; the token is the run's
    secret.
    """

    def __init__(self, names: Sequence[str], directory: pathlib.Path, token: str) -> None:
        self.names, self.directory, self._token = list(names), directory, token
        self.restarts = 0
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._deaths: Counter[str] = Counter()
        self._boots_before: dict[str, int] = {}
        self._stopped_for: dict[str, float] = {}
        self._looked_at = 0.0
        self._missed: set[str] = set()
        self._exited_at: dict[str, float] = {}
        self._left: list[str] = []
        self._retiring: set[str] = set()
        self._told_at = 0.0

    def start(self) -> None:
        """Start all processes."""
        for name in self.names:
            self._start(name)

    def add(self, name: str) -> None:
        """Start one more process."""
        self.names.append(name)
        self._start(name)

    def retire(self, names: Sequence[str]) -> None:
        """See Crew."""
        self._retiring.update(set(names) & set(self.names))
        self._told_at = 0.0

    def note_missed(self, names: Sequence[str]) -> None:
        """Note that the scheduler does not hear these processes: they are started again."""
        self._missed.update(names)

    def take_left(self) -> list[str]:
        """See Crew."""
        found, self._left = self._left, []
        return found

    def _tell_to_leave(self) -> None:
        """Signal the workers that are asked to leave; again, because one that starts may not have heard it."""
        if time.monotonic() - self._told_at < _REPEAT_SECONDS:
            return
        self._told_at = time.monotonic()
        for name in self._retiring:
            self._children[name].terminate()

    def _start(self, name: str) -> None:
        self._stopped_for[name] = 0.0
        self._boots_before[name] = run_folder.last_boot(self.directory, name)
        with local_job.open_log(log_path(self.directory, name), "ab") as output:
            self._children[name] = subprocess.Popen(
                command(name, self.directory),
                env={**os.environ, **environment(name, self._token), **self._accelerators(name)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _accelerators(self, name: str) -> Mapping[str, str]:
        """Return the variable that gives a worker its own GPUs of this machine, as far as there are enough."""
        workers = [each for each in self.names if worker_number(each) is not None]
        gpus = list_gpus(os.environ)
        if name not in workers or not gpus:
            return {}
        count = run_folder.Spec.read(self.directory / run_folder.SPEC_NAME).devices
        first = workers.index(name) * count
        return {_GPUS: ",".join(gpus[number % len(gpus)] for number in range(first, first + min(count, len(gpus))))}

    def look_after(self) -> dict[str, int]:
        """See Crew."""
        died = {}
        self._tell_to_leave()
        passed, self._looked_at = time.monotonic() - self._looked_at, time.monotonic()
        for name, child in list(self._children.items()):
            if self._is_missed(name) or self._is_stopped_for_long(name, child.pid, min(passed, _MOST_PASSED)):
                say(f"{name} does not answer. It is restarted.")
                child.kill()
                child.wait()
            status = child.poll()
            if status is not None and (status == LEFT_STATUS or name in self._retiring):
                self._forget(name)
                if status != LEFT_STATUS:  # the scheduler has not heard it
                    died[name] = run_folder.last_boot(self.directory, name)
                continue
            if status is None or (status == 0 and name != SCHEDULER and not self._left_early(name)):
                continue  # running, or exited at the end of the run before the observer knew of it
            if status == 0 and name == SCHEDULER:
                raise end_by_scheduler(self.directory)
            if status == ExitStatus.USER:  # it would end in the same way again
                raise RunFailedError(f"{name} cannot run here.\n{log_tail(self.directory, name)}")
            self._deaths[name] += 1
            if self._deaths[name] > MOST_DEATHS:
                tail = log_tail(self.directory, name)
                raise RunFailedError(f"{name} died {self._deaths[name]} times without a step in between.\n{tail}")
            self.restarts += 1
            self._exited_at.pop(name, None)
            died[name] = run_folder.last_boot(self.directory, name)
            self._start(name)
        return died

    def _forget(self, name: str) -> None:
        """Note that a worker has left."""
        del self._children[name]
        self.names.remove(name)
        self._retiring.discard(name)
        self._left.append(name)

    def _is_missed(self, name: str) -> bool:
        """Return whether a restart of a process is asked for, unless the process before it was meant."""
        asked = run_folder.take_silent(self.directory, name) or name in self._missed
        self._missed.discard(name)
        return asked and self._has_started(name)

    def _has_started(self, name: str) -> bool:
        """Return whether a process has taken its boot number, which it does right before it joins."""
        return run_folder.last_boot(self.directory, name) > self._boots_before[name]

    def _is_stopped_for_long(self, name: str, process_id: int, passed: float) -> bool:
        """Return whether a process has been stopped for long, now that `passed` seconds have passed."""
        self._stopped_for[name] = self._stopped_for[name] + passed if stopped.is_stopped(process_id) else 0.0
        return self._stopped_for[name] > STOPPED_SECONDS

    def _left_early(self, name: str) -> bool:
        """Return whether a process exited with 0 long ago although the run continues."""
        return time.monotonic() - self._exited_at.setdefault(name, time.monotonic()) > _EARLY_SECONDS

    def all_ended(self) -> bool:
        """Return whether all processes have ended."""
        return all(child.poll() is not None for child in self._children.values())

    def progressed(self) -> None:
        """Note that the run made progress: deaths are counted from zero again."""
        self._deaths.clear()

    def close(self, *, orderly: bool) -> None:
        """End all processes; `orderly` gives them time to exit by themselves, but not those that only start."""
        for name, child in self._children.items():
            if name != SCHEDULER and not self._has_started(name):  # it has not joined, so it was not told of the end
                child.kill()
        deadline = time.monotonic() + (GRACE_SECONDS if orderly else 0.0)
        while time.monotonic() < deadline and not self.all_ended():
            time.sleep(_LOOK_SECONDS)
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
            child.wait()


def list_gpus(environment: Mapping[str, str], devices: pathlib.Path = pathlib.Path("/dev")) -> list[str]:
    """Return the GPUs that processes of this machine may use, named as in CUDA_VISIBLE_DEVICES."""
    if _GPUS in environment:
        return [each for each in environment[_GPUS].split(",") if each]
    return [str(number) for number in range(len(list(devices.glob("nvidia[0-9]*"))))]


def command(name: str, directory: pathlib.Path) -> list[str]:
    """Return the command line of the process `name`."""
    module = "processes.scheduler_process" if name == SCHEDULER else "run.jax_process"
    spec = str(directory / run_folder.SPEC_NAME)
    return [sys.executable, "-m", f"jaxdist.paramserver.{module}", name, spec]


def environment(name: str, token: str) -> Mapping[str, str]:
    """Return the environment variables of the process `name`, a child of this process."""
    shared = {security.TOKEN: token, parent.PARENT_ID: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    if worker_number(name) is None:
        # The norms that NumPy computes here are too small for several threads, which would keep the cores busy.
        shared |= {"OPENBLAS_NUM_THREADS": "1"}
    # A server keeps its shard in host memory; only workers use accelerators.
    return shared | ({"JAX_PLATFORMS": "cpu"} if server_shard(name) is not None else {})


def log_path(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of the log of a process."""
    return directory / "logs" / f"{name.replace('/', '-')}.log"


def log_tail(directory: pathlib.Path, name: str, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of the log of a process."""
    path = log_path(directory, name)
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def end_by_scheduler(directory: pathlib.Path) -> RunFailedError:
    """Return the error of a run that its scheduler ended, with the reason; earlier warnings the observer has told."""
    return RunFailedError(f"The scheduler ended the run.\n{log_tail(directory, SCHEDULER, lines=1)}")

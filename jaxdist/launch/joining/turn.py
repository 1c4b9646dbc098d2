"""The turn of a process in reserve: it has prepared everything, and waits until the attempt before its own has ended.

The supervisor starts it with a directory in memory in its environment. There it says that it is ready, and reads from a
pipe when to begin. Until then its output goes to its log.
"""

import contextlib
import json
import os
import pathlib
import select
import sys
from collections.abc import Mapping

from jaxdist.launch.joining import places, runtime

DIRECTORY = "JAXDIST_STANDBY"
"""Environment variable: the directory in memory of the processes in reserve."""
_MOST_BYTES = 1 << 16


def ready_path(directory: pathlib.Path, process: int) -> pathlib.Path:
    """Return the file by which a process says that it is ready."""
    return directory / f"ready-{process}"


def pipe_path(directory: pathlib.Path, process: int) -> pathlib.Path:
    """Return the pipe from which it reads when to begin."""
    return directory / f"begin-{process}"


class Turn:
    """From its creation until `wait` has returned, this process is in reserve.

    `directory` is that of the processes in reserve; `log` is the file for what this one prints until then, None leaves
    its output alone.
    """

    def __init__(self, directory: pathlib.Path, process: int, log: pathlib.Path | None):
        self._directory, self._process = directory, process
        self._streams: list[int] = []
        if log is not None:
            self._hold_output(log)

    @classmethod
    def of_process(cls, environment: Mapping[str, str] = os.environ) -> "Turn | None":
        """Return the turn of this process, None if it is not in reserve."""
        if DIRECTORY not in environment:
            return None
        log = environment.get(runtime.LOG)
        return cls(
            pathlib.Path(environment[DIRECTORY]),
            int(environment[places.PROCESS_ID]),
            None if log is None else pathlib.Path(log),
        )

    def _hold_output(self, log: pathlib.Path) -> None:
        with contextlib.suppress(OSError):  # on a full disk it is shown early
            opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._streams = [os.dup(1), os.dup(2)]
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(opened, stream.fileno())
            os.close(opened)

    def has_come(self) -> bool:
        """Return whether the job waits for this process already; `wait` then returns at once."""
        with open(os.open(pipe_path(self._directory, self._process), os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
            return bool(select.select([pipe], [], [], 0)[0])

    def wait(self) -> None:
        """Say that this process is ready, and return when it is to begin, with the environment of the attempt."""
        with open(pipe_path(self._directory, self._process), "rb", buffering=0) as pipe:
            ready_path(self._directory, self._process).touch()
            content = pipe.read(_MOST_BYTES)
        os.environ.update(json.loads(content))
        for held, stream in zip(self._streams, (sys.stdout, sys.stderr)):
            stream.flush()
            os.dup2(held, stream.fileno())
            os.close(held)
        self._streams = []

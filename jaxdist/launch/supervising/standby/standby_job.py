"""A job in reserve: its processes have joined each other and loaded their programs, and wait for the word to begin."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

from jaxdist.launch.joining import turn
from jaxdist.launch.supervising import local_job


class StandbyJob:
    """Processes that are started in advance; `begin` makes them the running attempt.

    `directory` is in memory, new, for these processes alone.

    Attributes:
      group: as given; closing it ends the processes and removes the directory.
    """

    def __init__(self, directory: pathlib.Path, group: local_job.ProcessGroup):
        directory.mkdir(mode=0o700)
        self.group, self._directory = group, directory
        self._pipes: list[int] = []
        group.on_close(self._clean)

    def start(
        self, command: Sequence[str], starters: Sequence[local_job.Start], environment: Mapping[str, str]
    ) -> None:
        """Start the processes."""
        for number in range(len(starters)):
            path = turn.pipe_path(self._directory, number)
            os.mkfifo(path, 0o600)
            # Open in both directions, so that the word is kept until the process asks for it.
            self._pipes.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        self.group.start(command, starters, {**environment, turn.DIRECTORY: str(self._directory)})

    def is_ready(self) -> bool:
        """Return whether all processes wait for the word."""
        return all(turn.ready_path(self._directory, number).exists() for number in range(len(self._pipes)))

    def begin(self, environment: Mapping[str, str]) -> None:
        """Have the processes begin, with these environment variables; those that are not ready yet, once they are."""
        word = json.dumps(environment).encode()
        for pipe in self._pipes:
            os.write(pipe, word)

    def _clean(self) -> None:
        for pipe in self._pipes:
            os.close(pipe)
        self._pipes = []
        shutil.rmtree(self._directory, ignore_errors=True)

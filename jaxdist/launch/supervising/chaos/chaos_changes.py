"""Changes of the number of processes, for `chaos`: when processes join and leave, and the commands that do it."""

import contextlib
import pathlib
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import IO, Literal, TypeAlias

from jaxdist.errors import UserError

ChangeKind: TypeAlias = Literal["join", "leave"]
_COMMAND = (sys.executable, "-m", "jaxdist.cli")
_LOG_NAME = "joined.txt"
_END_SECONDS = 10.0


def sizes(kinds: Sequence[ChangeKind], num_processes: int) -> list[tuple[ChangeKind, int]]:
    """Return the changes in an order that is possible, each with the number of processes after it.

    A join doubles the number, a leave halves it: those are the numbers that suit the most experiments. A change that is
    not possible at its place waits for the next.

    Raises:
      UserError: there are too many of one kind.
    """
    most, waiting = max(4, 2 * num_processes), list(kinds)
    found: list[tuple[ChangeKind, int]] = []
    while waiting:
        kind = next((each for each in waiting if _is_possible(each, num_processes, most)), None)
        if kind is None:
            raise UserError(
                f"Joins double the number of processes, up to {most}, and leaves halve it, down to 1, so their numbers "
                f"may differ only by a few; got {kinds.count('join')} joins and {kinds.count('leave')} leaves."
            )
        waiting.remove(kind)
        num_processes = 2 * num_processes if kind == "join" else num_processes // 2
        found.append((kind, num_processes))
    return found


def _is_possible(kind: ChangeKind, num_processes: int, most: int) -> bool:
    return 2 * num_processes <= most if kind == "join" else num_processes % 2 == 0


class Commands:
    """Runs the commands that change a job, and ends those that still run when it is left.

    `seed` decides whether processes leave or are killed.
    """

    def __init__(self, run_dir: pathlib.Path, seed: int):
        self._run_dir, self._random = run_dir, random.Random(seed)
        self._joined: list[subprocess.Popen[bytes]] = []
        self._leaving: list[subprocess.Popen[bytes]] = []
        self._log: IO[bytes] = open(run_dir.parent / _LOG_NAME, "ab")  # noqa: SIM115, closed at the exit

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        for command in [*self._joined, *self._leaving]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(_END_SECONDS)  # it ends with the job
            command.kill()
            command.wait()
        self._log.close()

    def change(self, count: int, *, joins: bool) -> Callable[[], bool]:
        """Begin to add `count` processes or to take them out; return whether the job has been told of those to leave.

        It is told of those who join by themselves.
        """
        if joins:
            self._joined.append(self._start("join", count))
        elif self._joined:
            # The newest command has just as many: each has doubled the number of processes.
            newest = self._joined.pop()
            newest.send_signal(self._random.choice([signal.SIGTERM, signal.SIGKILL]))
            self._leaving.append(newest)
        else:
            self._leaving.append(leave := self._start("leave", count))
            return lambda: leave.poll() is not None
        return lambda: True

    def _start(self, name: str, count: int) -> "subprocess.Popen[bytes]":
        command = [*_COMMAND, name, str(self._run_dir), "--processes", str(count)]
        return subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

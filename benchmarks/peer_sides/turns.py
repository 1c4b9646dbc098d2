"""A side's end of the pipes to benchmarks/peers.py: it tells that it is ready, waits for its turns, answers each."""

import json
import os
import pathlib
import time
from collections.abc import Callable

PIPES = "PEER_PIPES"
"""The variable that names two FIFOs, one for orders and one for answers: a supervisor may start what trains."""


class Turns:
    """Called after each step; waits between turns.

    A turn is a line with its number of steps; the answer has its seconds. An empty line ends the training, and asks for
    the loss.
    """

    def __init__(self) -> None:
        orders, answers = os.environ[PIPES].split(os.pathsep)
        self._orders, self._answers = open(orders), open(answers, "w", buffering=1)  # noqa: SIM115 (until the end)
        self.left, self._start = 1, 0.0

    def step(self, wait: Callable[[], object]) -> bool:
        """Count a step; at a turn's end `wait` for its result. Return whether training continues."""
        self.left -= 1
        if self.left:
            return True
        wait()
        self._answer({"seconds": time.perf_counter() - self._start})
        order = self._orders.readline().strip()
        if not order:
            return False
        self.left, self._start = int(order), time.perf_counter()
        return True

    def tell(self, loss: float) -> None:
        """Answer the loss of the params that were trained."""
        self._answer({"loss": loss})

    def _answer(self, message: dict[str, float]) -> None:
        self._answers.write(json.dumps(message) + "\n")


STEPS = "PEER_STEPS"
"""The variable that names a file for the times of steps, where a side is not asked to wait."""


class Times:
    """Writes down when each step ended, and by which process."""

    def __init__(self, path: str) -> None:
        self._file = pathlib.Path(path).open("a", buffering=1)  # noqa: SIM115 (until the end)

    def write(self, step: int) -> None:
        """Add a line: the step, seconds since the epoch, the process."""
        self._file.write(f"{step} {time.time()} {os.getpid()}\n")

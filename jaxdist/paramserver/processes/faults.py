"""Faults at labelled points of the protocol, for tests: kill, stop or silence a process exactly there.

A label says what a process does with which message, effect or log record: `hear Push` (a push has arrived and is not
handled yet), `do CommitRecord` and `did CommitRecord` (before and after the record is durable), `send PushAck` (all
effects are done, the answer is not sent yet). The environment variable FAULTS holds lines `PROCESS LABEL COUNT ACTION`:

    server/0/a send PushAck 3 kill

COUNT says at which occurrence of the label the fault happens; a value below 1, for example 0.1, is a probability.
Actions: `kill` (SIGKILL), `stop` (SIGSTOP; the test sends SIGCONT), `full` (from now on this process can write no file
of more than FULL_BYTES, as on a full disk), `lose` and `repeat` (for `send` only: the message is not sent, or sent
twice). A fault with a COUNT happens once in a run: a file in the folder of the run marks it for restarted processes.
"""

import os
import pathlib
import random
import resource
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FAULTS = "JAXDIST_PS_FAULTS"

ACTIONS = ("kill", "stop", "full", "lose", "repeat")
FULL_BYTES = 500
"""Sufficient for the counters that every process writes, but not for a shard."""

Point = Callable[[str, Any], int]
"""Called with the verb (hear, do, did, send) and its object; returns how many times to do it."""


def no_faults(verb: str, what: Any) -> int:
    """Return 1: nothing is disturbed."""
    return 1


@dataclass(frozen=True)
class Fault:
    """One line of FAULTS."""

    process: str
    label: str
    when: float
    action: str

    @classmethod
    def parse(cls, line: str) -> "Fault":
        """Return the fault that a line describes; raises ValueError if it is invalid."""
        words = line.split()
        if len(words) != 5 or words[4] not in ACTIONS:
            raise ValueError(f"A line of {FAULTS} must be PROCESS VERB KIND COUNT ACTION, got {line!r}.")
        if words[4] in ("lose", "repeat") and words[1] != "send":
            raise ValueError(f"The actions lose and repeat need the verb send, got {line!r}.")
        return cls(words[0], f"{words[1]} {words[2]}", float(words[3]), words[4])


def faults_of(process: str, directory: pathlib.Path, environment: Mapping[str, str] = os.environ) -> Point:
    """Return the points of `process` with the faults that the environment variable FAULTS sets."""
    parsed = [Fault.parse(line) for line in environment.get(FAULTS, "").splitlines() if line.strip()]
    mine = [fault for fault in parsed if fault.process in (process, "*")]
    return _Points(mine, directory, process) if mine else no_faults


class _Points:
    def __init__(self, faults: list[Fault], directory: pathlib.Path, process: str) -> None:
        self._faults, self._directory, self._process = faults, directory / "faults", process
        self._passed: Counter[str] = Counter()
        self._random = random.Random(process)

    def __call__(self, verb: str, what: Any) -> int:
        label = f"{verb} {kind_of(what)}"
        self._passed[label] += 1
        times = 1
        for fault in self._faults:
            if fault.label in (label, f"{verb} *") and self._is_due(fault, label):
                times *= self._act(fault.action)
        return times

    def _is_due(self, fault: Fault, label: str) -> bool:
        if fault.when < 1:
            return self._random.random() < fault.when
        return self._passed[label] == fault.when and self._first_time(fault)

    def _first_time(self, fault: Fault) -> bool:
        name = f"{self._process} {fault.label} {fault.when:g} {fault.action}".replace("/", "-")
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            (self._directory / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _act(self, action: str) -> int:
        if action == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, resource.RLIM_INFINITY))
        elif action in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        return {"lose": 0, "repeat": 2}.get(action, 1)


def kind_of(what: Any) -> str:
    """Return the type name of a message or effect, or of the record that an effect writes."""
    return type(getattr(what, "record", what)).__name__

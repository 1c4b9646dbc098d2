"""Strikes: what is done to the processes of a job, when, and what it cost. They are drawn from a seed."""

import os
import random
import resource
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxdist.launch.supervising.chaos import chaos_changes

Kind = Literal["kill", "stop", "starve", "join", "leave"]

_EARLY_SHARE = 0.25
_EARLY_SECONDS = 6.0


@dataclass(frozen=True)
class Strike:
    """What is done to one process, and when.

    Attributes:
      kind: "kill" (SIGKILL), "stop" (SIGSTOP: alive, but does nothing), "starve" (it can write no file any more), or
        "join" and "leave", which change the number of processes.
      process: number of the process; of a job that has fewer at the time, counted on from 0. Not used by "join" and
        "leave".
      step: when it reports this step.
      early_seconds: None, or, instead of `step`, the seconds after the start of an attempt: while it imports, connects,
        restores or compiles.
      num_processes: of "join" and "leave", how many processes there are afterwards.
    """

    kind: Kind
    process: int
    step: int
    early_seconds: float | None = None
    num_processes: int | None = None


@dataclass(frozen=True)
class Hit:
    """A strike that was delivered, and what it cost.

    Attributes:
      strike: what was done.
      seconds: from the strike to the next new step.
      stages: of these, the seconds of each stage, where the job has stages.
      verdict: the processes that the watchdog named as the cause, and after how many seconds; None without a verdict.
      struck: the process: its number in the job, or its name.
    """

    strike: Strike
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    verdict: tuple[tuple[int, ...], float] | None = None
    struck: int | str = 0

    @property
    def name(self) -> str:
        """The name of the process that was struck."""
        return self.struck if isinstance(self.struck, str) else f"process {self.struck}"

    @property
    def named(self) -> bool:
        """Whether the verdict names the process that was struck, and no other."""
        return self.verdict is not None and self.verdict[0] == (self.struck,)


def plan(
    seed: int,
    *,
    num_processes: int,
    num_steps: int,
    kills: int,
    stops: int = 0,
    starves: int = 0,
    joins: int = 0,
    leaves: int = 0,
    num_changing: int | None = None,
) -> list[Strike]:
    """Return the strikes in the order of their steps; every process is struck in turn, process 0 in any case.

    They are a pure function of the arguments: how many processes are killed, stopped and starved of disk, and how often
    some join and leave, in as many steps as the undisturbed run has. `num_changing` of them may leave, by default all.

    Raises:
      UserError: joins and leaves differ too much, see `chaos_changes.sizes`.
    """
    source = random.Random(seed)
    counts: dict[Kind, int] = {"kill": kills, "stop": stops, "starve": starves}
    if joins or leaves:
        counts |= {"join": joins, "leave": leaves}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    source.shuffle(kinds)
    # No strike in the last tenth of the steps, so that even the last one comes before the end.
    steps = sorted(source.choices(range(1, max(2, num_steps * 9 // 10)), k=len(kinds)))
    order = iter(_turns(source, num_processes, kills + stops + starves))
    changing = [kind for kind in kinds if kind in ("join", "leave")]
    changes = iter(chaos_changes.sizes(changing, num_changing or num_processes))
    found = []
    for kind, step in zip(kinds, steps, strict=True):
        if kind in ("join", "leave"):
            kind, count = next(changes)
            found.append(Strike(kind, 0, step, num_processes=count))
            continue
        early = source.uniform(0.0, _EARLY_SECONDS) if kind == "kill" and source.random() < _EARLY_SHARE else None
        found.append(Strike(kind, next(order), step, early))
    return found


def _turns(source: random.Random, num_processes: int, count: int) -> list[int]:
    """Return which process each of `count` strikes is for: in rounds, and 0, which has most to do, among them."""
    rounds = range(-(-count // num_processes))
    found = [process for _ in rounds for process in source.sample(range(num_processes), num_processes)][:count]
    if found and 0 not in found:
        found[source.randrange(count)] = 0
    return found


def deliver(strike: Strike, process_id: int) -> bool:
    """Deliver a strike; return False if the process had ended by itself."""
    try:
        if strike.kind == "starve":
            # As on a full disk, every write fails; a file that is mapped or was written stays as it is.
            _, hard = resource.prlimit(process_id, resource.RLIMIT_FSIZE)
            resource.prlimit(process_id, resource.RLIMIT_FSIZE, (0, hard))
        else:
            os.kill(process_id, signal.SIGKILL if strike.kind == "kill" else signal.SIGSTOP)
    except ProcessLookupError:
        return False
    return True

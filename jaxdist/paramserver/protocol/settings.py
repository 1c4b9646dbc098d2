"""The settings of a parameter-server run (processes, mode, durability, timers), and the names of its processes."""

import functools
from dataclasses import dataclass, fields

from jaxdist.config.parameter_server import ParameterServer

SCHEDULER, OBSERVER = "scheduler", "observer"


@dataclass(frozen=True)
class Timers:
    """Seconds. A process is dead after `dead_after` without a heartbeat, stuck after `stuck_after` without progress."""

    heartbeat: float = 0.5
    retry: float = 1.0
    dead_after: float = 5.0
    stuck_after: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat < self.dead_after <= self.stuck_after or self.retry <= 0:
            raise ValueError(
                f"Timers must satisfy 0 < heartbeat < dead_after <= stuck_after and 0 < retry, got {self}. A process "
                "that sends heartbeats less often than dead_after would always count as dead."
            )


@dataclass(frozen=True, kw_only=True)
class Settings(ParameterServer):
    """The settings under `ps.`, and what the protocol must know about the training run.

    Attributes:
      num_examples: examples of one epoch.
      global_batch_size: examples of one step.
      max_steps: the run ends after this step.
      workers: see ParameterServer, as for the other settings under `ps.`.
      read_every: periods, in steps, after which the observer is offered a cut; it always is after the last step.
      stop_on_nonfinite: end the run, with reason `nonfinite`, at a gradient that is not finite; it is never applied.
      check_copies_every: updates after which the copies of a shard compare params and optimizer state; 0 never does.
      timers: seconds.
    """

    num_examples: int
    global_batch_size: int
    max_steps: int
    workers: int = 1
    read_every: tuple[int, ...] = ()
    stop_on_nonfinite: bool = False
    check_copies_every: int = 0
    timers: Timers = Timers()

    @classmethod
    def of(
        cls,
        chosen: ParameterServer,
        *,
        num_examples: int,
        global_batch_size: int,
        max_steps: int,
        read_every: tuple[int, ...],
        check_copies_every: int = 0,
    ) -> "Settings":
        """Return the Settings of a training run; raises ValueError if they contradict each other."""
        beat = min(chosen.dead_after_seconds / 10, Timers.heartbeat)
        return cls(
            **{field.name: getattr(chosen, field.name) for field in fields(chosen)},
            num_examples=num_examples,
            global_batch_size=global_batch_size,
            max_steps=max_steps,
            read_every=read_every,
            stop_on_nonfinite=True,
            check_copies_every=check_copies_every,
            timers=Timers(beat, 2 * beat, chosen.dead_after_seconds, max(300.0, chosen.dead_after_seconds)),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_examples", "global_batch_size", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, allowed in (
            ("mode", ("sync", "bounded", "async")),
            ("durability", ("none", "snapshot", "replicated")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"ps.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        self._check_mode()
        self._check_durability()

    def _check_mode(self) -> None:
        if (self.max_staleness and self.mode != "bounded") or self.max_staleness < 0:
            raise ValueError(
                f"ps.max_staleness applies to ps.mode=bounded and is at least 0, got {self.max_staleness} with mode "
                f"{self.mode!r}. Set ps.mode=bounded, or leave ps.max_staleness unset."
            )
        if not 0 <= self.backup_workers < self.workers or (self.backup_workers and not self.synchronous):
            raise ValueError(
                f"ps.backup_workers needs a synchronous mode and must be smaller than ps.workers, got "
                f"{self.backup_workers} of {self.workers} workers with mode {self.mode!r}."
            )
        if self.damp_staleness and self.synchronous:
            raise ValueError("ps.damp_staleness has no effect without staleness. Use ps.mode=bounded or ps.mode=async.")
        if self.synchronous and self.global_batch_size < self.num_slices:
            raise ValueError(
                f"A batch of {self.global_batch_size} examples cannot be divided into {self.num_slices} slices, one "
                "for each worker that a step waits for. Set ps.workers to at most "
                f"{self.global_batch_size + self.backup_workers}, or a larger global_batch_size."
            )

    def _check_durability(self) -> None:
        if any(period < 1 for period in self.read_every):
            raise ValueError(f"The periods in read_every must be at least 1, got {self.read_every}.")
        if self.snapshot_every < 0 or (self.durability == "snapshot" and not self.snapshot_every):
            raise ValueError(
                f"ps.durability=snapshot needs ps.snapshot_every of at least 1, got {self.snapshot_every}."
            )
        if self.durability == "none" and self.snapshot_every:
            raise ValueError(
                f"ps.snapshot_every={self.snapshot_every} has no effect with ps.durability=none. Choose snapshot or "
                "replicated."
            )

    @functools.cached_property
    def synchronous(self) -> bool:
        """Whether a step waits for its whole batch: mode sync, or bounded with no staleness."""
        return self.mode == "sync" or (self.mode == "bounded" and self.max_staleness == 0)

    @functools.cached_property
    def shards_report(self) -> bool:
        """Whether shards tell the scheduler what they have staged. With copies of slices it would not be the same."""
        return self.synchronous and not self.backup_workers

    @functools.cached_property
    def num_slices(self) -> int:
        """The number of slices of a step's batch: one, unless a step waits for several workers."""
        return self.workers - self.backup_workers if self.synchronous else 1

    @functools.cached_property
    def replicated(self) -> bool:
        """Whether every shard has a backup."""
        return self.durability == "replicated"

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """The number of steps of one epoch, including the last, ragged one."""
        return -(-self.num_examples // self.global_batch_size)


def worker_name(worker: int) -> str:
    """Return the process name of a worker."""
    return f"worker/{worker}"


def worker_number(name: str) -> int | None:
    """Return the number of the worker with this process name; None if it is not a worker's name."""
    kind, _, number = name.partition("/")
    return int(number) if kind == "worker" and number.isdecimal() else None


def server_name(shard: int, copy: int) -> str:
    """Return the process name of a copy (0 or 1) of a shard."""
    return f"server/{shard}/{'ab'[copy]}"


def server_shard(name: str) -> int | None:
    """Return the shard of the server with this process name; None if it is not a server's name."""
    parts = name.split("/")
    return int(parts[1]) if len(parts) == 3 and parts[0] == "server" and parts[1].isdecimal() else None


def shard_file(cut: str, shard: int) -> str:
    """Return the name of a shard's file in a saved cut."""
    return f"{cut}/shard-{shard}"


def saved_cut_file(cut: str) -> str:
    """Return the name of the file that makes a saved cut complete (journal.SavedCut); it is written last."""
    return f"{cut}/manifest"

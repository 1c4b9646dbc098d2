"""What a run of the parameter server is told once: how many of whom, which mode, which promises, which timers."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["sync", "bounded", "async"]
Durability = Literal["none", "snapshot", "replicated"]

SCHEDULER = "scheduler"


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
                f"timers must satisfy 0 < heartbeat < dead_after <= stuck_after and 0 < retry, got {self}: a process "
                "that is heard of less often than dead_after would be dead all the time"
            )


@dataclass(frozen=True)
class Settings:
    """The settings under `ps.`, and what the protocol must know of the training run.

    Attributes:
      num_examples: examples of one data epoch.
      global_batch_size: examples of one step.
      max_steps: the run ends after this step.
      workers: worker processes. In sync mode a step is cut into `workers - backup_workers` slices.
      servers: shards of the params.
      mode: sync, bounded or async.
      max_staleness: clocks a worker may be ahead of the slowest (bounded mode; 0 is the sync mode).
      backup_workers: workers a step does not wait for (sync mode).
      durability: none, snapshot or replicated.
      snapshot_every: steps between two consistent cuts; 0 makes none.
      read_every: periods, in steps, after which the scheduler reads all params (effects.Cut); the end always counts.
      stop_on_nonfinite: end the run, with reason `nonfinite`, at a gradient that is not; it is left out either way.
      damp_staleness: multiply an update by 1 / (1 + staleness) (bounded and async).
      timers: seconds.
    """

    num_examples: int
    global_batch_size: int
    max_steps: int
    workers: int = 1
    servers: int = 1
    mode: Mode = "sync"
    max_staleness: int = 0
    backup_workers: int = 0
    durability: Durability = "none"
    snapshot_every: int = 0
    read_every: tuple[int, ...] = ()
    stop_on_nonfinite: bool = False
    damp_staleness: bool = False
    timers: Timers = Timers()

    def __post_init__(self) -> None:
        for name in ("num_examples", "global_batch_size", "max_steps", "workers", "servers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, allowed in (
            ("mode", ("sync", "bounded", "async")),
            ("durability", ("none", "snapshot", "replicated")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"ps.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self._check_mode()
        self._check_durability()

    def _check_mode(self) -> None:
        if (self.max_staleness and self.mode != "bounded") or self.max_staleness < 0:
            raise ValueError(
                f"ps.max_staleness bounds the mode 'bounded' and is at least 0, got {self.max_staleness} with mode "
                f"{self.mode!r}: set ps.mode=bounded or leave ps.max_staleness alone"
            )
        if not 0 <= self.backup_workers < self.workers or (self.backup_workers and not self.synchronous):
            raise ValueError(
                f"ps.backup_workers needs a synchronous mode and at least one worker that is none, got "
                f"{self.backup_workers} of {self.workers} workers with mode {self.mode!r}"
            )
        if self.damp_staleness and self.synchronous:
            raise ValueError("ps.damp_staleness has no effect without staleness: use the modes bounded or async")
        if self.synchronous and self.global_batch_size < self.num_slices:
            raise ValueError(
                f"a batch of {self.global_batch_size} examples cannot be cut into {self.num_slices} slices, one for "
                "each worker: use fewer workers or larger batches"
            )

    def _check_durability(self) -> None:
        if any(period < 1 for period in self.read_every):
            raise ValueError(f"the periods in read_every must be at least 1, got {self.read_every}")
        if self.snapshot_every < 0 or (self.durability == "snapshot" and not self.snapshot_every):
            raise ValueError(f"ps.durability=snapshot needs ps.snapshot_every of at least 1, got {self.snapshot_every}")
        if self.durability == "none" and self.snapshot_every:
            raise ValueError(
                f"ps.snapshot_every={self.snapshot_every} has no effect with ps.durability=none: choose snapshot or "
                "replicated"
            )

    @property
    def synchronous(self) -> bool:
        """True when a step waits for its whole batch: mode sync, or bounded by zero."""
        return self.mode == "sync" or (self.mode == "bounded" and self.max_staleness == 0)

    @property
    def num_slices(self) -> int:
        """Parts a step's batch is cut into: one, unless a step waits for several workers."""
        return self.workers - self.backup_workers if self.synchronous else 1

    @property
    def replicated(self) -> bool:
        """True when every shard has a backup."""
        return self.durability == "replicated"

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one data epoch, the last, ragged one included."""
        return -(-self.num_examples // self.global_batch_size)


@dataclass(frozen=True, kw_only=True)
class ParameterServer:
    """What a user may set under `ps.`; see Settings."""

    workers: int = 2
    servers: int = 1
    mode: Mode = "sync"
    max_staleness: int = 0
    backup_workers: int = 0
    durability: Durability = "none"
    snapshot_every: int = 0
    damp_staleness: bool = False
    dead_after_seconds: float = 5.0
    engine: Literal["processes", "ray"] = "processes"
    """Who keeps the processes alive: this machine (with `hosts`, each machine its own), or a Ray cluster."""
    hosts: tuple[str, ...] = ()
    """Addresses of several machines, the one that trains first; see `host`. Empty: this machine, on the loopback."""
    port: int = 7800
    """With `hosts`: the first of the ports that the processes listen on."""

    def __post_init__(self) -> None:
        if self.hosts and self.engine != "processes":
            raise ValueError(f"ps.hosts belongs to ps.engine=processes; {self.engine} places the processes itself")

    def settings(
        self, *, num_examples: int, global_batch_size: int, max_steps: int, read_every: tuple[int, ...]
    ) -> Settings:
        """Return the Settings of a training run; raises ValueError where they contradict each other."""
        beat = self.dead_after_seconds / 10
        return Settings(
            num_examples=num_examples,
            global_batch_size=global_batch_size,
            max_steps=max_steps,
            workers=self.workers,
            servers=self.servers,
            mode=self.mode,
            max_staleness=self.max_staleness,
            backup_workers=self.backup_workers,
            durability=self.durability,
            snapshot_every=self.snapshot_every,
            read_every=read_every,
            stop_on_nonfinite=True,
            damp_staleness=self.damp_staleness,
            timers=Timers(beat, 2 * beat, self.dead_after_seconds, max(300.0, self.dead_after_seconds)),
        )


def worker_name(worker: int) -> str:
    """Return the process name of a worker."""
    return f"worker/{worker}"


def worker_number(name: str) -> int | None:
    """Return the worker a process name stands for; None when it is not a worker's."""
    kind, _, number = name.partition("/")
    return int(number) if kind == "worker" and number.isdecimal() else None


def server_name(shard: int, copy: int) -> str:
    """Return the process name of a copy (0 or 1) of a shard."""
    return f"server/{shard}/{'ab'[copy]}"


def server_shard(name: str) -> int | None:
    """Return the shard a process name serves; None when it is not a server's."""
    parts = name.split("/")
    return int(parts[1]) if len(parts) == 3 and parts[0] == "server" and parts[1].isdecimal() else None


def shard_file(snapshot: str, shard: int) -> str:
    """Return the name of a shard's file in a snapshot."""
    return f"{snapshot}/shard-{shard}"


def manifest_file(snapshot: str) -> str:
    """Return the name of a snapshot's manifest, which is written last."""
    return f"{snapshot}/manifest"

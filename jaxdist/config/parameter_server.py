"""The settings of the strategy parameter-server, under `ps.`."""

import math
from typing import Literal

from jaxdist.setting_group import setting_group

Mode = Literal["sync", "bounded", "async"]
Durability = Literal["none", "snapshot", "replicated"]
LAST_PORT = 65535


@setting_group
class ParameterServer:
    """How many workers and servers there are, what they wait for, and what survives when one of them fails.

    Attributes:
      workers: worker processes. In sync mode a batch is divided into `workers - backup_workers` slices.
      servers: shards of the params.
      mode: sync, bounded or async.
      max_staleness: clocks a worker may be ahead of the slowest (bounded mode; 0 is the sync mode).
      backup_workers: number of workers that a step does not wait for (sync mode).
      durability: none, snapshot or replicated.
      snapshot_every: steps between two saved cuts; 0 saves none.
      damp_staleness: multiply an update by 1 / (1 + staleness) (bounded and async).
      dead_after_seconds: seconds without a heartbeat after which a process counts as dead.
      engine: what keeps the processes alive: this machine (with `hosts`, each machine its own), or a Ray cluster.
      hosts: addresses of several machines, first the one that starts the run; empty means this machine, on its loopback
        interface.
      port: with `hosts`, the first of the ports that the processes listen on.
    """

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
    hosts: tuple[str, ...] = ()
    port: int = 7800

    def __post_init__(self) -> None:
        for name in ("workers", "servers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"ps.{name} must be at least 1, got {getattr(self, name)}. Leave it out for the default, or use "
                    "another --strategy, which needs neither workers nor servers."
                )
        if not 1 < self.dead_after_seconds < math.inf:
            raise ValueError(
                f"ps.dead_after_seconds must be larger than 1, got {self.dead_after_seconds}: a busy process is heard "
                "every half second. The default of 5 suits most networks."
            )
        if not 0 < self.port <= LAST_PORT:
            raise ValueError(f"ps.port must be from 1 to {LAST_PORT}, got {self.port}. Choose a free range above 1023.")
        if self.hosts and self.engine != "processes":
            raise ValueError(f"ps.hosts needs ps.engine=processes; {self.engine} places the processes itself.")

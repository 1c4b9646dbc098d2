"""What goes wrong in a simulated run, how often, and how fast its machines are."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Faults:
    """The faults until `until` (seconds); rates are per message, per effect, or per second of the run.

    Attributes:
      until: afterwards no fault happens.
      drop: share of messages lost.
      repeat: share of messages delivered twice.
      slow: share of messages delayed by up to 0.3 s, and thereby overtaken.
      late: share of messages that are delivered once more, up to 5 s later.
      breaks: connections that fail, a second; what travels on them is lost.
      partitions: partitions a second; each isolates one process for up to 1 s. Half of them break its connections.
      kills: kills a second.
      crash: share of the points of a driver (before and after what it does) at which its process dies.
      lost_disk: share of the deaths after which the process has forgotten its boot numbers.
      pauses: SIGSTOPs a second; each lasts up to 2 s.
      crash_at_append: share of log appends during which the process dies.
      disk_full: share of file writes that fail.
      disk_slow: share of writes, of files and of log records, that take up to 1.5 s.
      busy: share of messages that take up to 1.5 s to handle; meanwhile others wait, and a due tick comes first.
      jumps: times a second at which the clock of a process jumps, by up to 1,000 s in either direction, or stands
        still for up to 2 s. The wall clock, from which boot numbers are made, is set by as much.
      vanish: probability that a server or worker, once it has joined, is silent for good, unless its crew is asked to
        replace it.
      slow_worker: how many times slower worker 0 computes.
      joins: workers a second that join the run.
      leaves: workers a second that are asked to leave. When the last one is, another joins a while later.
    """

    until: float = 3.0
    drop: float = 0.0
    repeat: float = 0.0
    slow: float = 0.0
    late: float = 0.0
    breaks: float = 0.0
    partitions: float = 0.0
    kills: float = 0.0
    crash: float = 0.0
    lost_disk: float = 0.0
    pauses: float = 0.0
    crash_at_append: float = 0.0
    disk_full: float = 0.0
    disk_slow: float = 0.0
    busy: float = 0.0
    jumps: float = 0.0
    vanish: float = 0.0
    slow_worker: float = 1.0
    joins: float = 0.0
    leaves: float = 0.0


CALM = Faults(until=0.0)


@dataclass(frozen=True)
class Hardware:
    """How fast machines and network are, faults apart.

    Attributes:
      bandwidth: bytes a second of one connection.
      latency: seconds (at least, at most) until what was sent arrives.
      handle_seconds: how long a process is occupied by one message, and by one byte of a large one.
      fsync_seconds: (at least, at most) until a log record is durable.
      small_bytes: the longest message that travels on the connection for small ones.
      window: bytes that travel on a connection before its sender waits.
      queue_bytes: bytes that wait for one connection before messages are dropped.
      budget: bytes of large messages that a process receives, or holds unhandled, at a time.
    """

    bandwidth: float = math.inf
    latency: tuple[float, float] = (0.001, 0.005)
    handle_seconds: tuple[float, float] = (0.0, 0.0)
    fsync_seconds: tuple[float, float] = (0.0, 0.0)
    small_bytes: int = 64 << 10
    window: int = 1 << 20
    queue_bytes: int = 256 << 20
    budget: int = 256 << 20


FAST = Hardware()
"""Bytes and messages take no time, but for the latency."""

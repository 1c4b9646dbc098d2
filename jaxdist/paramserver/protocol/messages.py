"""What workers, servers and the scheduler say to each other: frozen dataclasses, holding numbers, names and arrays.

A message is a value: it may be lost, repeated or overtaken, so each one carries who speaks (worker, incarnation), which
of its requests this is (sequence) and, from the scheduler, under which membership (epoch). `encoding` gives the bytes.
"""

from dataclasses import dataclass

import numpy as np

NO_CLOCK = -1
"""The clock of a request outside the bounded mode."""

BENCHED = 1 << 60
"""The clock floor of a member that holds no lease: nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The examples a worker may turn into one push: positions [start, stop) of data epoch `data_epoch`.

    `step` is the step those examples belong to (counted from 0), `slice` their place in its batch.
    """

    step: int
    slice: int
    data_epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Contributor:
    """The push that stands for one slice of a committed step, and the examples it was computed from."""

    worker: int
    incarnation: int
    sequence: int
    lease: Lease


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that may push. Its next update has at least the clock `floor` (bounded mode)."""

    worker: int
    incarnation: int
    floor: int


@dataclass(frozen=True, slots=True)
class ShardView:
    """Who serves a shard. `boot` tells lives of a process apart; `synced` says the backup may take over."""

    primary: str
    primary_boot: int
    backup: str
    backup_boot: int
    synced: bool


@dataclass(frozen=True, slots=True)
class View:
    """Membership under `epoch`. Shards whose state is older than `restore_epoch` first load snapshot `restore`."""

    epoch: int
    members: tuple[Member, ...]
    shards: tuple[ShardView, ...]
    restore_epoch: int
    restore: str


@dataclass(frozen=True, slots=True)
class Seen:
    """One row of the exactly-once table: the last push of a worker that was applied, and the step its lease was for."""

    worker: int
    incarnation: int
    sequence: int
    step: int


@dataclass(frozen=True, slots=True)
class Rows:
    """A row-sparse piece: rows `ids` (int32 or int64, counted within the block) get `values`, one row each."""

    ids: np.ndarray
    values: np.ndarray


Piece = np.ndarray | Rows


# Joining and staying: processes <-> scheduler.


@dataclass(frozen=True, slots=True)
class Register:
    """Process `node`, in its life `boot` (grows with every restart), wants to take part."""

    node: str
    boot: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The scheduler's answer to a worker: the incarnation it pushes under."""

    node: str
    boot: int
    incarnation: int
    view: View


@dataclass(frozen=True, slots=True)
class Fenced:
    """`node` in life `boot` is no longer a member: forget everything and register anew."""

    node: str
    boot: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Alive. `progress` counts finished actions; `busy` says the next one depends on nobody else.

    `lease`, `sequence` and `clock` tell a restarted scheduler what this worker holds.
    """

    node: str
    boot: int
    epoch: int
    progress: int
    busy: bool
    sequence: int = 0
    clock: int = 0
    lease: Lease | None = None


@dataclass(frozen=True, slots=True)
class ViewAck:
    """A primary works under `epoch`; `seen` is its exactly-once table, `front` the highest clock it ever knew."""

    shard: int
    node: str
    boot: int
    epoch: int
    version: int
    front: int
    seen: tuple[Seen, ...]


@dataclass(frozen=True, slots=True)
class Synced:
    """The backup of `shard` holds everything its primary acknowledges from now on."""

    shard: int
    epoch: int
    backup: str
    backup_boot: int


# A worker's round: ask, pull, compute, push, report.


@dataclass(frozen=True, slots=True)
class Ask:
    """A worker is free; `sequence` is the last lease it finished or gave back."""

    worker: int
    incarnation: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Lease number `sequence` of this incarnation, to be computed under `clock`."""

    worker: int
    incarnation: int
    epoch: int
    sequence: int
    clock: int
    lease: Lease


@dataclass(frozen=True, slots=True)
class Revoke:
    """Give the lease back if its params have not all arrived yet."""

    worker: int
    incarnation: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Pull:
    """Ask for a shard's params at `version` or later that hold every update the bound demands of `clock`."""

    shard: int
    worker: int
    incarnation: int
    sequence: int
    version: int
    clock: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """A shard's params, one array a block."""

    shard: int
    worker: int
    incarnation: int
    sequence: int
    version: int
    pieces: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class Push:
    """A shard's part of one gradient: the sum over the lease's examples, of which there were `count`.

    `version` is the shard version it was computed from, `norm_squared` belongs to the whole mean gradient, over all
    shards; `finite` is False when any leaf on any shard is not.
    """

    shard: int
    worker: int
    incarnation: int
    sequence: int
    version: int
    clock: int
    lease: Lease
    count: float
    finite: bool
    norm_squared: float
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class PushAck:
    """What became of a push: staged, applied, duplicate (of an applied one), obsolete, fenced or refused (why)."""

    shard: int
    worker: int
    incarnation: int
    sequence: int
    status: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean that can still be added up."""

    name: str
    total: float
    count: float


@dataclass(frozen=True, slots=True)
class Done:
    """Every shard acknowledged push `sequence`."""

    worker: int
    incarnation: int
    sequence: int
    clock: int
    lease: Lease
    finite: bool
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True)
class DoneAck:
    """The scheduler knows."""

    worker: int
    incarnation: int
    sequence: int


# A step: scheduler <-> primaries.


@dataclass(frozen=True, slots=True)
class Commit:
    """Make the step after `step - 1` from exactly these staged pushes, in this order; `skip` applies nothing."""

    epoch: int
    shard: int
    step: int
    skip: bool
    contributors: tuple[Contributor, ...]


@dataclass(frozen=True, slots=True)
class Norms:
    """The squared norm of each block of the summed gradient, in the shard's block order."""

    shard: int
    step: int
    squares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The squared global norm of step `step`'s gradient: now apply it."""

    epoch: int
    shard: int
    step: int
    norm_squared: float


@dataclass(frozen=True, slots=True)
class CommitAck:
    """The shard is at `step` or beyond."""

    shard: int
    step: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Write your state down under `name`; no push is in flight while this is asked. `number` grows within an epoch."""

    epoch: int
    shard: int
    number: int
    name: str


@dataclass(frozen=True, slots=True)
class SnapshotDone:
    """The shard's file is on disk, `checksum` is the CRC-32 of its bytes; or it is not, for `error`."""

    shard: int
    name: str
    checksum: int
    error: str


@dataclass(frozen=True, slots=True)
class Read:
    """The scheduler wants a shard's params while no push is in flight. `number` grows within an epoch."""

    epoch: int
    shard: int
    number: int


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """A shard's params and optimizer state, and the fingerprint of the updates they hold."""

    epoch: int
    shard: int
    number: int
    version: int
    chain: int
    pieces: tuple[np.ndarray, ...]
    opt_state: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """The run ended after `step`, for `reason`."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class StopAck:
    """`node` stops."""

    node: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whoever looked at the params after `step` (effects.Cut) says: go on (empty), or end for `end_reason`."""

    step: int
    end_reason: str


@dataclass(frozen=True, slots=True)
class Halt:
    """Somebody who watches the run wants it ended, for `reason`, as soon as the step in hand is."""

    reason: str


# A shard's copy: primary <-> backup.


@dataclass(frozen=True, slots=True)
class Members:
    """The members of `epoch`, as an entry of a shard's log."""

    epoch: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Nothing:
    """An entry that changes nothing: its acknowledgement shows that the primary still is one."""


Entry = Push | Commit | Finish | Members | Nothing


@dataclass(frozen=True, slots=True)
class Replicate:
    """Entry number `index` of a shard's log; `chain` is the fingerprint of all updates once it is applied."""

    shard: int
    epoch: int
    index: int
    chain: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Replicated:
    """The backup holds everything up to entry `index`."""

    shard: int
    epoch: int
    node: str
    boot: int
    index: int


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard as one value: weights, optimizer, exactly-once table, clocks and what is staged."""

    version: int
    chain: int
    epoch: int
    params: tuple[np.ndarray, ...]
    opt_state: tuple[np.ndarray, ...]
    seen: tuple[Seen, ...]
    clocks: tuple[tuple[int, int], ...]
    front: int
    members: tuple[Member, ...]
    staged: tuple[Push, ...]
    summed: tuple[np.ndarray, ...]
    summing: Commit | None


@dataclass(frozen=True, slots=True)
class Transfer:
    """The whole state of a shard after log entry `index`, for a new backup."""

    shard: int
    epoch: int
    index: int
    boot: int
    state: ShardState


# What a machine's own driver tells it. These never travel.


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The gradient of lease `sequence` of `incarnation`: per shard its pieces, summed over `count` examples."""

    incarnation: int
    sequence: int
    count: float
    finite: bool
    norm_squared: float
    pieces: tuple[tuple[Piece, ...], ...]
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """The file `name` is durable, with this CRC-32 of its bytes; or `error` says why it is not."""

    name: str
    checksum: int
    error: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The bytes of file `name`; None when it is missing."""

    name: str
    data: bytes | None


Message = object
"""Any of the dataclasses above."""

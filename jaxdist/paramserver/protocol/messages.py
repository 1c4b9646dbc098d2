"""The messages between workers, servers and the scheduler: frozen dataclasses of numbers, names and arrays.

A message may be lost, repeated or reordered, so each one carries its sender (worker, incarnation), the number of the
request (sequence) and, from the scheduler, the term of the membership it belongs to. `encoding` turns it into bytes.
"""

from dataclasses import dataclass

import numpy as np

NO_CLOCK = -1
"""The clock of an update in sync mode, where clocks are not used."""

BENCHED = 1 << 60
"""The clock floor of a member without work: no reader waits for it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The examples a worker may turn into one push: positions [start, stop) of `epoch`.

    `step` is the step of these examples (counted from 0), `slice` their place in its batch.
    """

    step: int
    slice: int
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Contributor:
    """The push of one slice of a committed step, and the lease it was computed from."""

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
class ShardPlace:
    """The processes that serve a shard. A boot number distinguishes starts of a process; `synced` allows a failover."""

    primary: str
    primary_boot: int
    backup: str
    backup_boot: int
    synced: bool


@dataclass(frozen=True, slots=True)
class Membership:
    """The processes of the run in `term`. A shard with older state than `restore_term` first loads cut `restore`."""

    term: int
    members: tuple[Member, ...]
    shards: tuple[ShardPlace, ...]
    restore_term: int
    restore: str


@dataclass(frozen=True, slots=True)
class Seen:
    """One row of the exactly-once table: the last applied push of a worker, and the step of its lease."""

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


@dataclass(frozen=True, slots=True)
class Trained:
    """The steps whose examples are trained: all steps before `step`, and the ones in `beyond`."""

    step: int
    beyond: tuple[int, ...]


# Membership: processes <-> scheduler.


@dataclass(frozen=True, slots=True)
class Register:
    """Process `name` asks to join. `boot` grows with every start of the process."""

    name: str
    boot: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The scheduler's answer to a worker: the incarnation that its pushes carry."""

    name: str
    boot: int
    incarnation: int
    membership: Membership


@dataclass(frozen=True, slots=True)
class Fenced:
    """Boot `boot` of `name` is no longer a member: it must discard its state and register again.

    `newest` is the largest boot number known, if it is larger: the next one must be larger than that, too.
    """

    name: str
    boot: int
    newest: int = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The process is alive. `progress` counts finished actions; `busy`: the next one depends on this process alone.

    From `lease`, `sequence` and `clock` a restarted scheduler learns what the worker holds.
    """

    name: str
    boot: int
    term: int
    progress: int
    busy: bool
    sequence: int = 0
    clock: int = 0
    lease: Lease | None = None


@dataclass(frozen=True, slots=True)
class MembershipAck:
    """A primary entered `term`; `seen` is its exactly-once table, `front` the highest clock it ever saw."""

    shard: int
    name: str
    boot: int
    term: int
    version: int
    front: int
    seen: tuple[Seen, ...]


@dataclass(frozen=True, slots=True)
class Synced:
    """The backup of `shard` now holds everything that its primary has acknowledged."""

    shard: int
    term: int
    backup: str
    backup_boot: int


@dataclass(frozen=True, slots=True)
class Diverged:
    """Server `name` found that the copies of its shard differ; `reason` is the sentence for the user."""

    name: str
    boot: int
    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """The crew saw the process `name` end; its boot numbers were at most `boot`."""

    name: str
    boot: int


@dataclass(frozen=True, slots=True)
class Retire:
    """A worker is asked to leave the run once it has finished the lease that it holds."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Worker `name` leaves the run: it holds no lease that it will finish. The answer is Fenced."""

    name: str
    boot: int


# A lease: ask, pull, compute, push, report.


@dataclass(frozen=True, slots=True)
class Ask:
    """A worker asks for a lease; `sequence` is the last one it finished or returned."""

    worker: int
    incarnation: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Lease number `sequence` of this incarnation, to be computed at `clock`.

    `report`: the worker is to say itself when all shards have its push, because another slice waits for it.
    `made_of`: the fingerprint of the pushes of the last step, 0 if it made no update; see Pulled.
    """

    worker: int
    incarnation: int
    term: int
    sequence: int
    clock: int
    lease: Lease
    report: bool = False
    made_of: int = 0


@dataclass(frozen=True, slots=True)
class Revoke:
    """Return the lease unless all its params have arrived."""

    worker: int
    incarnation: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Pull:
    """Ask for a shard's params: `version` or later, with every update that the staleness bound requires at `clock`."""

    shard: int
    worker: int
    incarnation: int
    sequence: int
    version: int
    clock: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """A shard's params, one array per block.

    With a fingerprint in `ahead`, the step that makes this version is not committed yet: they may be used if it is
    committed with just these pushes, which the Grant tells. So they travel while the commit is decided.
    """

    shard: int
    worker: int
    incarnation: int
    sequence: int
    version: int
    pieces: tuple[np.ndarray, ...]
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Push:
    """A shard's part of one gradient: the sum over the lease's examples, of which the loss counted `count`.

    Blocks of model state are sums over all `num_examples` examples, each with the same weight.

    `version` is the shard version it was computed from. `norm_squared` and `finite` describe the mean gradient over all
    shards. In a synchronous mode it asks for the params of the next step as well, as a Pull with the next sequence
    number would; the servers answer when they have them.
    """

    shard: int
    worker: int
    incarnation: int
    sequence: int
    version: int
    clock: int
    lease: Lease
    count: float
    num_examples: float
    finite: bool
    norm_squared: float
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class PushAck:
    """The result of a push: staged, applied, duplicate, obsolete, fenced, or refused for `reason`."""

    shard: int
    worker: int
    incarnation: int
    sequence: int
    status: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean as its total and count, which can be added."""

    name: str
    total: float
    count: float


@dataclass(frozen=True, slots=True)
class Done:
    """Push `sequence` is computed and, if `staged`, acknowledged by every shard; else the shards tell that (Staged)."""

    worker: int
    incarnation: int
    sequence: int
    clock: int
    lease: Lease
    count: float
    finite: bool
    metrics: tuple[Metric, ...]
    staged: bool = True


@dataclass(frozen=True, slots=True)
class Staged:
    """A shard tells the scheduler that it has a push for every slice of `step`: a detour by the workers takes longer.

    `fingerprint` says which pushes; see `sums`. One number for all of them keeps this short with many workers.
    """

    shard: int
    step: int
    fingerprint: int


@dataclass(frozen=True, slots=True)
class DoneAck:
    """The scheduler received Done. Where the shards report what is staged, the next Grant says so as well."""

    worker: int
    incarnation: int
    sequence: int


# A step: scheduler <-> primaries.


@dataclass(frozen=True, slots=True)
class Commit:
    """Apply step `step` from exactly these staged pushes, in this order; `skip` applies none.

    Where `fingerprint` is not 0, the list is left out: it is that of the shard's own note (Staged).
    """

    term: int
    shard: int
    step: int
    skip: bool
    contributors: tuple[Contributor, ...]
    fingerprint: int = 0


@dataclass(frozen=True, slots=True)
class Norms:
    """The squared norm of each block of the summed gradient, in the shard's block order. `term`: of the commit."""

    term: int
    shard: int
    step: int
    squares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Apply step `step`; its gradient has this squared global norm."""

    term: int
    shard: int
    step: int
    norm_squared: float


@dataclass(frozen=True, slots=True)
class CommitAck:
    """The shard has applied `step`, or a later one, as it was told in `term`.

    `squares`: squared norm of its mean gradient, -1 if unknown.
    """

    term: int
    shard: int
    step: int
    squares: float = -1.0


@dataclass(frozen=True, slots=True)
class SaveCut:
    """Save the shard as part of cut `name`. Sent while no push is in flight; `number` grows within a term."""

    term: int
    shard: int
    number: int
    name: str


@dataclass(frozen=True, slots=True)
class CutSaved:
    """The shard's file of cut `name` is on disk, with this CRC-32; or `error` says why it is not."""

    shard: int
    name: str
    checksum: int
    error: str


# A cut: scheduler -> observer <-> primaries.


@dataclass(frozen=True, slots=True)
class Offer:
    """The observer may read the cut after `step`: no shard changes in this term before its verdict.

    `number` grows within a term. `end_reason` is empty while the run continues; `primaries` are in shard order.
    """

    term: int
    number: int
    step: int
    end_reason: str
    trained: Trained
    primaries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Ask for one part of a shard, PARAMS or OPT_STATE, of the cut with this term and number."""

    term: int
    shard: int
    number: int
    part: str


PARAMS, OPT_STATE = "params", "opt_state"


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """One part of a shard, and the fingerprint of its update history."""

    term: int
    shard: int
    number: int
    part: str
    version: int
    chain: int
    arrays: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class StopRun:
    """The run ended after `step`, for `reason`."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class StopAck:
    """Process `name` stops."""

    name: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The observer's answer to the offer with this term and number: end for `end_reason`, continue if it is empty.

    The step would not do: a late verdict on it from an earlier term would let shards change while the cut is read.
    """

    term: int
    number: int
    end_reason: str


@dataclass(frozen=True, slots=True)
class Halt:
    """The observer asks to end the run, for `reason`, after the current step."""

    reason: str


# A shard's copy: primary <-> backup.


@dataclass(frozen=True, slots=True)
class SetMembers:
    """Entry of a shard's log: the members of `term`."""

    term: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class NoOp:
    """Entry that changes nothing; its acknowledgement shows that the sender is still the primary."""


Entry = Push | Commit | Finish | SetMembers | NoOp


@dataclass(frozen=True, slots=True)
class Replicate:
    """Entry number `index` of a shard's log; `chain` is the fingerprint of all updates after it."""

    shard: int
    term: int
    index: int
    chain: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Replicated:
    """The backup holds everything up to entry `index`."""

    shard: int
    term: int
    index: int


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard as one value: params, optimizer state, exactly-once table, clocks and staged pushes."""

    version: int
    chain: int
    term: int
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
    term: int
    index: int
    state: ShardState


# From the driver of the same process. These are never sent.


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Want:
    """The observer needs these parts of the cut that is offered."""

    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GetReady:
    """Add up what has arrived for the next step, ahead of its commit."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The gradient of lease `sequence` of `incarnation`: per shard its pieces, as in Push."""

    incarnation: int
    sequence: int
    count: float
    num_examples: float
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
    """The content of file `name`; None if it is missing or damaged."""

    name: str
    content: object | None


Message = object
"""Any dataclass of this module."""

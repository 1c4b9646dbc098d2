"""What is written down: the scheduler's log, before it acts on it; snapshots' manifests; the params for who watches.

Frozen dataclasses like the messages, and encoded the same way (see `encoding`); they lie in files and never travel.
"""

from dataclasses import dataclass

from jaxdist.paramserver.protocol.messages import Contributor, ReadAnswer, Register, View


@dataclass(frozen=True, slots=True)
class LedgerState:
    """Which steps' examples are trained: all of those before `step`, and the ones in `beyond`."""

    step: int
    beyond: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CutFile:
    """All params after `step` (see effects.Cut), as they are written down for whoever watches the run."""

    step: int
    end_reason: str
    ledger: LedgerState
    shards: tuple[ReadAnswer, ...]


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """A change of membership; `incarnations` is how many were ever given out. With `ledger`, also a return to it."""

    view: View
    incarnations: int
    boots: tuple[Register, ...]
    ledger: LedgerState | None


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """Step `step` is made of these pushes."""

    step: int
    skip: bool
    contributors: tuple[Contributor, ...]


@dataclass(frozen=True, slots=True)
class NormRecord:
    """The squared global norm of the last committed step's gradient."""

    norm_squared: float


@dataclass(frozen=True, slots=True)
class CompleteRecord:
    """One push, on every shard, by itself (bounded and async)."""

    contributor: Contributor


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A snapshot is complete on disk."""

    name: str
    ledger: LedgerState


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    """The params after `step` were looked at, with this result."""

    step: int
    end_reason: str


@dataclass(frozen=True, slots=True)
class StopRecord:
    """The run ended."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class ManifestShard:
    """A shard's file in a snapshot."""

    shard: int
    name: str
    checksum: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A snapshot: written last, when every file it names is on disk. Incarnations go on after `incarnations`."""

    name: str
    step: int
    incarnations: int
    ledger: LedgerState
    shards: tuple[ManifestShard, ...]

"""Contents of files: the records of the scheduler's log, and saved cuts.

Frozen dataclasses like the messages, and encoded the same way (see `encoding`). A record is durable before the
scheduler acts on it.
"""

from dataclasses import dataclass

from jaxdist.paramserver.protocol.messages import Contributor, Membership, Register, Trained


@dataclass(frozen=True, slots=True)
class MembershipRecord:
    """A change of membership; `incarnations` is how many were ever assigned. With `trained`, also a rollback to it."""

    membership: Membership
    incarnations: int
    boots: tuple[Register, ...]
    trained: Trained | None


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """Step `step` consists of these pushes; `skip` applies none of them."""

    step: int
    skip: bool
    contributors: tuple[Contributor, ...]


@dataclass(frozen=True, slots=True)
class EmptyRecord:
    """The loss counts no example of step `step`, whose record follows: it makes no update, and training continues."""

    step: int


@dataclass(frozen=True, slots=True)
class NormRecord:
    """The squared global norm of the last committed step's gradient."""

    norm_squared: float


@dataclass(frozen=True, slots=True)
class CompleteRecord:
    """Every shard applied this push by itself (bounded and async)."""

    contributor: Contributor


@dataclass(frozen=True, slots=True)
class SavedCutRecord:
    """The saved cut `name` is complete on disk."""

    name: str
    trained: Trained


@dataclass(frozen=True, slots=True)
class StateRecord:
    """The content of the log between two steps, in one record that replaces all earlier ones.

    `saved_at` and `read_at` are the steps of the last attempt to save a cut and of the last cut that was shown.
    """

    membership: MembershipRecord
    saved: SavedCutRecord
    trained: Trained
    saved_at: int
    read_at: int


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    """The verdict of the observer on the cut after `step`."""

    step: int
    end_reason: str


@dataclass(frozen=True, slots=True)
class StopRecord:
    """The run ended."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class SavedShard:
    """The file of one shard in a saved cut, and the CRC-32 of its bytes."""

    shard: int
    name: str
    checksum: int


@dataclass(frozen=True, slots=True)
class SavedCut:
    """A saved cut: written last, when every file it names is on disk. `incarnations` is how many were assigned."""

    name: str
    step: int
    incarnations: int
    trained: Trained
    shards: tuple[SavedShard, ...]

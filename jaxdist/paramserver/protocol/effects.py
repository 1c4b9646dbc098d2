"""Effects: what a state machine asks its driver to do, in order, before the driver sends the replies.

That order is the write-ahead rule: if the driver dies between two effects, no other process has received anything that
depends on a record that is not durable.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxdist.paramserver.protocol import journal, messages


class Send(NamedTuple):
    """A message for the process named `to`."""

    to: str
    message: messages.Message


@dataclass(frozen=True, slots=True)
class Append:
    """Append `record` to the log and make it durable before the next effect."""

    record: messages.Message


@dataclass(frozen=True, slots=True)
class Compact:
    """Replace the whole log by `record`, atomically and durably, before the next effect."""

    record: journal.StateRecord


@dataclass(frozen=True, slots=True)
class Write:
    """Write a file atomically; the driver answers with messages.Written."""

    name: str
    content: messages.Message


@dataclass(frozen=True, slots=True)
class Load:
    """Read a file; the driver answers with messages.Loaded."""

    name: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Read the examples of `lease`, whose gradient will be computed once its params have arrived."""

    lease: messages.Lease


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute the gradient of `lease` from `params` (one tuple of blocks per shard); see messages.Computed."""

    incarnation: int
    sequence: int
    lease: messages.Lease
    params: tuple[tuple[np.ndarray, ...], ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """For observers: a copy of a shard made update `version`; `before` and `after` fingerprint its history."""

    shard: int
    term: int
    version: int
    before: int
    after: int
    contributors: tuple[messages.Contributor, ...]
    clock: int
    staleness: int
    skipped: bool


@dataclass(frozen=True, slots=True)
class Served:
    """For observers: a worker reading at `clock` was sent the params of a shard whose history is `chain`."""

    shard: int
    term: int
    worker: int
    clock: int
    version: int
    chain: int


@dataclass(frozen=True, slots=True)
class Leads:
    """For observers: this process is the primary of `shard` in `term`."""

    shard: int
    term: int


@dataclass(frozen=True, slots=True)
class Committed:
    """For observers: `step` is committed, with these metrics (totals and counts); `empty` ones made no update."""

    step: int
    examples: int
    metrics: tuple[messages.Metric, ...]
    empty: bool = False


@dataclass(frozen=True, slots=True)
class GradNorm:
    """For observers: the global norm of the mean gradient of `step`, once all shards have applied it."""

    step: int
    norm: float


@dataclass(frozen=True, slots=True)
class Offered:
    """For the observer: it may read a cut, and answers with messages.Want or, at last, messages.Verdict."""

    offer: messages.Offer


@dataclass(frozen=True, slots=True)
class CutRead:
    """For the observer: the parts that it wanted, each with the arrays of one shard after the other."""

    offer: messages.Offer
    chains: tuple[int, ...]
    params: tuple[tuple[np.ndarray, ...], ...]
    opt_state: tuple[tuple[np.ndarray, ...], ...]


@dataclass(frozen=True, slots=True)
class Warn:
    """Log a warning for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Log why the run ends by an error; the crew shows it when the scheduler has exited."""

    text: str


@dataclass(frozen=True, slots=True)
class Replace:
    """Have the crew restart the process `name`, which does not answer."""

    name: str


LEFT = "left"
"""The reason of an Exit of a worker that has left the run, which continues."""


@dataclass(frozen=True, slots=True)
class Continue:
    """Handle `message`, from this process itself, next: once the replies have been sent."""

    message: messages.Message


@dataclass(frozen=True, slots=True)
class Exit:
    """End this process after `step`, for `reason`; a negative step means an error."""

    step: int
    reason: str


Effect = (
    Append
    | Compact
    | Write
    | Load
    | Prepare
    | Compute
    | Applied
    | Served
    | Leads
    | Committed
    | GradNorm
    | Offered
    | CutRead
    | Warn
    | Fail
    | Replace
    | Continue
    | Exit
)


class Output:
    """The replies and effects of one handled message."""

    def __init__(self) -> None:
        self.replies: list[Send] = []
        self.effects: list[Effect] = []

    def send(self, to: str, message: messages.Message) -> None:
        """Add a reply; an empty name means no process."""
        if to:
            self.replies.append(Send(to, message))

    def do(self, effect: Effect) -> None:
        """Add an effect."""
        self.effects.append(effect)

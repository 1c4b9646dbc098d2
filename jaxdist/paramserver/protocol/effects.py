"""What a state machine wants done besides sending replies; its driver does it, in order, before the replies leave.

That order is the write-ahead rule: when a driver dies between two effects, nobody has heard of what was not durable.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxdist.paramserver.protocol import journal, messages


class Send(NamedTuple):
    """A reply: `message` goes to the process named `to`."""

    to: str
    message: messages.Message


@dataclass(frozen=True, slots=True)
class Append:
    """Add `record` to the log and make it durable before going on."""

    record: messages.Message


@dataclass(frozen=True, slots=True)
class Write:
    """Make a file, wholly or not at all; answer with messages.Written."""

    name: str
    content: messages.Message


@dataclass(frozen=True, slots=True)
class Load:
    """Read a file; answer with messages.Loaded."""

    name: str


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute the gradient of `lease` from `params` (per shard its blocks); answer with messages.Computed."""

    incarnation: int
    sequence: int
    lease: messages.Lease
    params: tuple[tuple[np.ndarray, ...], ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """For the record: a copy of a shard made update `version`; `before`, `after` are fingerprints of its history."""

    shard: int
    epoch: int
    version: int
    before: int
    after: int
    contributors: tuple[messages.Contributor, ...]
    clock: int
    staleness: int
    skipped: bool


@dataclass(frozen=True, slots=True)
class Served:
    """For the record: params of a shard, of history `chain`, left for a worker that reads under `clock`."""

    shard: int
    epoch: int
    worker: int
    clock: int
    version: int
    chain: int


@dataclass(frozen=True, slots=True)
class Leads:
    """For the record: this process is primary of `shard` under `epoch`."""

    shard: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Committed:
    """For the record: `step` is done, with these metrics (totals and counts)."""

    step: int
    examples: int
    metrics: tuple[messages.Metric, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """All params after `step`, one answer a shard: for evaluation, for a checkpoint, and for the end.

    No lease goes out until it is answered with messages.Verdict.
    """

    step: int
    end_reason: str  # empty where the run goes on
    ledger: journal.LedgerState
    shards: tuple[messages.ReadAnswer, ...]


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Exit:
    """The machine's part is over, after `step`, for `reason`."""

    step: int
    reason: str


Effect = Append | Write | Load | Compute | Applied | Served | Leads | Committed | Cut | Warn | Exit


class Output:
    """Replies and effects, collected while a message is handled."""

    def __init__(self) -> None:
        self.replies: list[Send] = []
        self.effects: list[Effect] = []

    def send(self, to: str, message: messages.Message) -> None:
        """Add a reply; nothing is sent to the empty name."""
        if to:
            self.replies.append(Send(to, message))

    def do(self, effect: Effect) -> None:
        """Add an effect."""
        self.effects.append(effect)

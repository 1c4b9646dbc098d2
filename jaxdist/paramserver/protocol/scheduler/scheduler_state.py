"""What the scheduler knows: the run's membership, its books and whatever is under way, and how a log brings it back."""

from dataclasses import dataclass

from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.protocol.journal import LedgerState, Manifest
from jaxdist.paramserver.protocol.messages import Lease
from jaxdist.paramserver.protocol.scheduler.lease_table import FRESH, BatchLedger, StepLedger
from jaxdist.paramserver.protocol.settings import Settings, worker_name


@dataclass(slots=True)
class Life:
    """What is known of a process: when it was heard of, and when it last got anywhere."""

    boot: int
    seen_at: float
    progress: int = -1
    progress_at: float = 0.0
    busy: bool = False

    def note(self, beat: messages.Heartbeat, now: float) -> None:
        """Take in a heartbeat."""
        if beat.progress != self.progress or not beat.busy:
            self.progress, self.progress_at = beat.progress, now
        self.seen_at, self.busy = now, beat.busy


@dataclass(slots=True)
class Worker:
    """What the scheduler knows of one incarnation."""

    incarnation: int
    heard: bool = True  # False after a restart of the scheduler, until the worker says what it holds
    idle: bool = False
    benched: bool = False
    sequence: int = 0  # the last lease handed out
    finished: int = 0  # the last lease that came back
    clock: int = 0
    lease: Lease | None = None
    granted_at: float = 0.0
    seconds: float = 0.0  # how long its last lease took
    step: int = -1  # the step of its last finished lease


class SchedulerState:
    """Everything the scheduler's stages read and change. Only they do: see `scheduler` for who does what."""

    def __init__(self, settings: Settings, resume: Manifest | None) -> None:
        self.settings = settings
        self.counters = {"torn_pushes": 0, "failovers": 0, "fenced": 0, "rollbacks": 0}
        self.snapshot = (resume.name, resume.ledger) if resume else ("", FRESH)  # what a lost shard goes back to
        # Membership.
        self.lives: dict[str, Life] = {}
        self.boots: dict[str, int] = {}
        self.workers: dict[int, Worker] = {}
        self.incarnations = resume.incarnations if resume else 0
        self.view: messages.View | None = None
        # The books, and the commit that not every shard has yet.
        self.ledger = self.books(self.snapshot[1])
        self.last_commit: journal.CommitRecord | None = None
        self.committed: set[int] = set()
        self.norms: dict[int, tuple[float, ...]] = {}
        self.norm_squared: float | None = None
        self.torn: set[tuple[int, int, int]] = set()
        # Cuts.
        self.snapshot_at = self.read_at = self.ledger.step
        self.read_last = False
        self.attempts = 0
        self.forget_progress()
        # The end.
        self.halted = ""
        self.stop: journal.StopRecord | None = None
        self.awaiting_stop: set[str] = set()
        self.stopped_at = 0.0
        self.exited = False

    def books(self, ledger: LedgerState) -> StepLedger | BatchLedger:
        """Return the ledger of this mode that stands at `ledger`."""
        return (StepLedger if self.settings.synchronous else BatchLedger)(self.settings, ledger)

    def forget_progress(self) -> None:
        """Drop whatever belongs to one epoch only."""
        self.acks: dict[int, messages.ViewAck] = {}
        self.snapshotting = ""
        self.snapshot_done: dict[int, messages.SnapshotDone] = {}
        self.reading = 0
        self.judging = False
        self.answers: dict[int, messages.ReadAnswer] = {}

    def replay(self, record: messages.Message) -> None:
        """Take in a record of an earlier life's log."""
        if isinstance(record, journal.ViewRecord):
            self.view, self.incarnations = record.view, record.incarnations
            self.boots = {row.node: row.boot for row in record.boots}
            if record.ledger is not None:
                self.ledger, self.last_commit = self.books(record.ledger), None
        elif isinstance(record, journal.CommitRecord):
            assert isinstance(self.ledger, StepLedger)
            self.last_commit, self.norm_squared = record, None
            self.ledger.advance()
            self.note_nonfinite(not record.skip)
        elif isinstance(record, journal.NormRecord):
            self.norm_squared = record.norm_squared
        elif isinstance(record, journal.CompleteRecord):
            assert isinstance(self.ledger, BatchLedger)
            self.ledger.complete(record.contributor.lease.step)
        elif isinstance(record, journal.SnapshotRecord):
            self.snapshot, self.snapshot_at = (record.name, record.ledger), self.ledger.step
        elif isinstance(record, journal.VerdictRecord):
            self.read_at, self.halted = record.step, record.end_reason
            self.read_last = self.ending()
        elif isinstance(record, journal.StopRecord):
            self.stop = record

    @property
    def epoch(self) -> int:
        """The current epoch; 0 before the first view."""
        return self.view.epoch if self.view else 0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.ledger.step

    def worker(self, number: int, incarnation: int) -> Worker | None:
        """Return this life of a worker, None if it is no member."""
        worker = self.workers.get(number)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def everybody(self) -> list[str]:
        """Return the names of all servers and workers of the view."""
        assert self.view is not None
        servers = [name for place in self.view.shards for name in (place.primary, place.backup) if name]
        return servers + [worker_name(member.worker) for member in self.view.members]

    def settled(self) -> bool:
        """Return True when all shards work under the current view."""
        return len(self.acks) == self.settings.servers

    def gated(self) -> bool:
        """Return True when readers wait for each other's clocks."""
        return self.settings.mode == "bounded" and not self.settings.synchronous

    def end_reason(self) -> str:
        """Return why no more steps are to be made; empty where the run goes on."""
        return self.halted or ("max_steps" if self.step >= self.settings.max_steps else "")

    def ending(self) -> bool:
        """Return True when no more steps are to be made."""
        return bool(self.end_reason())

    def note_nonfinite(self, finite: bool) -> None:
        """Take note whether a push was finite; where not, the run may have to end."""
        if not finite and self.settings.stop_on_nonfinite:
            self.halted = self.halted or "nonfinite"

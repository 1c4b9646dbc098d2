"""The scheduler's state: membership, lease table and what is in progress, and how a log restores it."""

from dataclasses import dataclass

from jaxdist.paramserver.protocol import journal, messages, sums
from jaxdist.paramserver.protocol.journal import SavedCut
from jaxdist.paramserver.protocol.messages import Lease, Trained
from jaxdist.paramserver.protocol.scheduler.lease_table import FRESH, BatchLeases, StepLeases
from jaxdist.paramserver.protocol.settings import Settings, worker_name


@dataclass(slots=True)
class ProcessStatus:
    """When a process was last heard from, and when it last made progress."""

    boot: int
    seen_at: float
    progress: int = -1
    progress_at: float = 0.0
    busy: bool = False
    warned: bool = False
    replaced_at: float | None = None  # when its restart was requested

    def note(self, beat: messages.Heartbeat, now: float) -> None:
        """Note a heartbeat."""
        if beat.progress != self.progress or not beat.busy:
            self.progress, self.progress_at = beat.progress, now
        self.busy = beat.busy
        self.hear(now)

    def hear(self, now: float) -> None:
        """Note a sign of life."""
        self.seen_at, self.warned, self.replaced_at = now, False, None


@dataclass(slots=True)
class WorkerStatus:
    """What the scheduler knows about one incarnation of a worker."""

    incarnation: int
    benched: bool = False
    sequence: int = 0  # the last lease granted
    finished: int = 0  # the last lease finished or returned
    clock: int = 0
    lease: Lease | None = None
    granted_at: float = 0.0
    seconds: float = 0.0  # how long its last lease took
    step: int = -1  # the step of its last finished lease


class SchedulerState:
    """The state that the stages of the scheduler share; only they read and change it. See `scheduler`."""

    def __init__(self, settings: Settings, resume: SavedCut | None) -> None:
        self.settings = settings
        self.counters = {"torn_pushes": 0, "failovers": 0, "fenced": 0, "rollbacks": 0, "left": 0}
        self.saved_cut = (resume.name, resume.trained) if resume else ("", FRESH)  # restored when a shard is lost
        # Membership.
        self.processes: dict[str, ProcessStatus] = {}
        self.boots: dict[str, int] = {}
        self.workers: dict[int, WorkerStatus] = {}
        # Workers that registered since the last tick, and their boots. Those in `boots` belong to the incarnations of
        # the membership, so that a restarted scheduler does not take a new process for the one before it.
        self.joining: dict[int, int] = {}
        self.missing_at: float | None = None  # when to tell which servers have not joined
        self.idle: set[int] = set()  # workers that asked for a lease and have none
        self.unreported: set[int] = set()  # after a restart: workers that have not reported their lease
        self.incarnations = resume.incarnations if resume else 0
        self.membership: messages.Membership | None = None
        # The lease table, and the commit that not every shard has applied yet.
        self.lease_table = self.make_lease_table(self.saved_cut[1])
        self.last_commit: journal.CommitRecord | None = None
        self.made_of = 0  # see messages.Grant
        self.logged_steps = 0  # since the log was replaced by one record
        self.committed: set[int] = set()
        self.squares: dict[int, float] = {}
        self.norms: dict[int, tuple[float, ...]] = {}
        self.norm_squared: float | None = None
        self.torn: set[tuple[int, int, int]] = set()
        self.staged: dict[int, messages.Staged] = {}  # what each shard told last
        # Cuts.
        self.saved_at = self.read_at = self.lease_table.step
        self.read_last = False
        self.attempts = 0
        self.forget_progress()
        # The end.
        self.halted = ""
        self.empty_step = 0  # the last step of which the loss counted no example
        self.stop: journal.StopRecord | None = None
        self.awaiting_stop: set[str] = set()
        self.stopped_at = 0.0
        self.exited = False

    def make_lease_table(self, trained: Trained) -> StepLeases | BatchLeases:
        """Return the lease table of this mode after the steps in `trained`."""
        return (StepLeases if self.settings.synchronous else BatchLeases)(self.settings, trained)

    def forget_progress(self) -> None:
        """Discard the state that belongs to one term."""
        self.acks: dict[int, messages.MembershipAck] = {}
        self.saving = ""
        self.saved_shards: dict[int, messages.CutSaved] = {}
        self.offered = 0  # the number of the cut that waits for its verdict; 0 for none

    def replay(self, record: messages.Message) -> None:
        """Apply a record of the log that was written before a restart."""
        self.logged_steps += isinstance(record, journal.CommitRecord | journal.CompleteRecord)
        if isinstance(record, journal.StateRecord):
            self._replay_state(record)
        elif isinstance(record, journal.MembershipRecord):
            self._replay_membership(record)
        elif isinstance(record, journal.CommitRecord):
            assert isinstance(self.lease_table, StepLeases)
            self.norm_squared = None
            self.note_commit(record)
            self.lease_table.advance()
            self.note_nonfinite(record.step == self.empty_step or not record.skip)
        elif isinstance(record, journal.EmptyRecord):
            self.empty_step = record.step
        elif isinstance(record, journal.NormRecord):
            self.norm_squared = record.norm_squared
        elif isinstance(record, journal.CompleteRecord):
            assert isinstance(self.lease_table, BatchLeases)
            self.lease_table.complete(record.contributor.lease.step)
        elif isinstance(record, journal.SavedCutRecord):
            self.saved_cut, self.saved_at = (record.name, record.trained), self.lease_table.step
        elif isinstance(record, journal.VerdictRecord):
            self.read_at, self.halted = record.step, record.end_reason
            self.read_last = bool(record.end_reason)
        elif isinstance(record, journal.StopRecord):
            self.stop = record

    def note_commit(self, record: journal.CommitRecord) -> None:
        """Note the last commit."""
        self.last_commit = record
        self.made_of = 0 if record.skip else sums.fingerprint(record.contributors)

    def _replay_state(self, record: journal.StateRecord) -> None:
        self._replay_membership(record.membership)
        self.saved_cut = (record.saved.name, record.saved.trained)
        self.lease_table, self.last_commit = self.make_lease_table(record.trained), None
        self.saved_at, self.read_at = record.saved_at, record.read_at

    def _replay_membership(self, record: journal.MembershipRecord) -> None:
        self.membership, self.incarnations = record.membership, record.incarnations
        self.boots = {row.name: row.boot for row in record.boots}
        if record.trained is not None:  # the first membership, or a rollback
            self.saved_cut = (record.membership.restore, record.trained)
            self.lease_table, self.last_commit = self.make_lease_table(record.trained), None
            self.saved_at = self.read_at = self.lease_table.step

    def membership_record(self, trained: Trained | None = None) -> journal.MembershipRecord:
        """Return the membership as a log record; `trained` is set at the start of the run and at a rollback."""
        assert self.membership is not None
        boots = tuple(messages.Register(name, boot) for name, boot in self.boots.items())
        return journal.MembershipRecord(self.membership, self.incarnations, boots, trained)

    def state_record(self) -> journal.StateRecord:
        """Return the record that replaces the log between two steps: replaying it restores this state."""
        assert self.last_commit is None
        return journal.StateRecord(
            self.membership_record(),
            journal.SavedCutRecord(*self.saved_cut),
            self.lease_table.trained(),
            self.saved_at,
            self.read_at,
        )

    @property
    def term(self) -> int:
        """The current term; 0 before the first membership."""
        return self.membership.term if self.membership else 0

    @property
    def step(self) -> int:
        """The number of trained steps."""
        return self.lease_table.step

    def worker(self, number: int, incarnation: int) -> WorkerStatus | None:
        """Return the status of this incarnation of a worker; None unless it is a member."""
        worker = self.workers.get(number)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def all_names(self) -> list[str]:
        """Return the names of all servers and workers in the membership."""
        assert self.membership is not None
        servers = [name for place in self.membership.shards for name in (place.primary, place.backup) if name]
        return servers + [worker_name(member.worker) for member in self.membership.members]

    def settled(self) -> bool:
        """Return whether all shards have entered the current term."""
        return len(self.acks) == self.settings.servers

    def gated(self) -> bool:
        """Return whether readers wait for each other's clocks."""
        return self.settings.mode == "bounded" and not self.settings.synchronous

    def end_reason(self) -> str:
        """Return why no further step is committed; empty while the run continues."""
        return self.halted or ("max_steps" if self.step >= self.settings.max_steps else "")

    def ending(self) -> bool:
        """Return whether no further step is committed."""
        return bool(self.end_reason())

    def note_nonfinite(self, finite: bool) -> None:
        """Note whether a push was finite; if not, the run may have to end."""
        if not finite and self.settings.stop_on_nonfinite:
            self.halted = self.halted or "nonfinite"

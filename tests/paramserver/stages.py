"""A scheduler in the middle of a run, for the test of one stage: servers and workers have joined."""

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.settings import Settings, Timers, server_name, worker_name

TIMERS = Timers(heartbeat=0.5, retry=1.0, dead_after=5.0, stuck_after=60.0)


def settings(**changes):
    return Settings(**{"num_examples": 20, "global_batch_size": 6, "max_steps": 9, "timers": TIMERS, **changes})


class Cast:
    """A scheduler and stand-ins for all other processes; `said` is what it sent and did in the last call."""

    def __init__(self, chosen, **kwargs):
        self.settings, self.now = chosen, 0.0
        self.scheduler = Scheduler(settings=chosen, **kwargs)
        self.state = self.scheduler.state
        self.log = []

    def tell(self, *received):
        """Deliver messages at one time; return (messages sent, effects) of all of them."""
        sent, done = [], []
        for message in received:
            replies, todo = self.scheduler.handle(message, self.now)
            sent += replies
            done += todo
        self.log += [effect.record for effect in done if type(effect).__name__ == "Append"]
        for effect in done:
            if type(effect).__name__ == "Compact":
                self.log = [effect.record]
        return sent, done

    def tick(self, seconds=0.05):
        self.now += seconds
        return self.tell(messages.Tick())

    def wait(self, seconds):
        """Let time pass, with a tick every quarter of a second."""
        for _ in range(round(seconds / 0.25)):
            self.tick(0.25)

    def servers(self):
        copies = 2 if self.settings.replicated else 1
        return [server_name(shard, copy) for shard in range(self.settings.servers) for copy in range(copies)]

    def join(self):
        """Let all servers and workers join, and all shards enter the term."""
        self.tell(*(messages.Register(name, 1) for name in self.servers()))
        self.tell(*(messages.Register(worker_name(number), 1) for number in range(self.settings.workers)))
        self.tick()
        self.enter_term()
        return self

    def enter_term(self):
        return self.tell(*(self.entered(shard) for shard in range(self.settings.servers)))

    def entered(self, shard, seen=(), front=0):
        place = self.state.membership.shards[shard]
        return messages.MembershipAck(shard, place.primary, place.primary_boot, self.state.term, 0, front, seen)

    def ask(self, number, sequence=0):
        """Return the lease that `number` is granted when it asks; None if it gets none."""
        sent, _ = self.tell(messages.Ask(number, self.state.workers[number].incarnation, sequence))
        return next((m.lease for _, m in sent if isinstance(m, messages.Grant) and m.worker == number), None)

    def finish(self, number, lease, *, sequence=1, count=2.0, finite=True):
        incarnation = self.state.workers[number].incarnation
        metrics = (messages.Metric("loss", 1.0, count),)
        return self.tell(messages.Done(number, incarnation, sequence, 0, lease, count, finite, metrics))

    def applied(self, step):
        return self.tell(*(messages.CommitAck(self.state.term, shard, step) for shard in range(self.settings.servers)))

    def step(self):
        """Train one step with every worker (sync mode without backup workers)."""
        for number, worker in self.state.workers.items():
            lease = worker.lease or self.ask(number, worker.sequence)
            self.finish(number, lease, sequence=worker.sequence)
        return self.applied(self.state.step)

    def beat(self, name):
        """Return a heartbeat of a process that is up to date."""
        return messages.Heartbeat(name, self.state.boots[name], self.state.term, 0, False)

    def answer_cut(self, end_reason=None):
        """Answer as the observer does when it is offered a cut."""
        reason = self.state.end_reason() if end_reason is None else end_reason
        return self.tell(messages.Verdict(self.state.term, self.state.offered, reason))

    def save_cut(self):
        """Answer as the servers and the disk do when a cut is saved."""
        name = self.state.saving
        for shard in range(self.settings.servers):
            self.tell(messages.CutSaved(shard, name, 5, ""))
        return self.tell(messages.Written(f"{name}/manifest", 6, ""))

    def restarted(self):
        """Return the cast after a restart of the scheduler, which knows its log alone."""
        other = Cast(self.settings, records=self.log)
        other.log, other.now = list(self.log), self.now
        return other


def named(items, kind):
    """Return the messages or effects of one kind; messages without their receiver."""
    items = [item.message if hasattr(item, "message") else item for item in items]
    return [item for item in items if type(item).__name__ == kind]

"""A server: one copy of one shard, primary or backup, as a state machine without I/O.

The primary turns requests into log entries, applies each at once, sends it to its backup, and delays the answer until
the backup has the entry. Reads are (empty) entries too, so a primary that was replaced without knowing it cannot
answer. The scheduler names the primary in the membership; if it names no backup, answers are sent at once.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from jaxdist.paramserver.protocol import effects, messages, sums
from jaxdist.paramserver.protocol.settings import OBSERVER, SCHEDULER, Settings, server_shard, shard_file, worker_name
from jaxdist.paramserver.protocol.shard import Outcome, Shard, ack

NO_STATE = -1
MAX_EARLY = 256  # log entries a backup keeps while an earlier one is missing


class Server:
    """One process's copy of a shard. `handle` is the whole interface."""

    def __init__(self, *, name: str, boot: int, settings: Settings, make_shard: Callable[[], Shard]) -> None:
        number = server_shard(name)
        assert number is not None, f"{name!r} is not the name of a server"
        self.name, self.boot, self.number, self.settings = name, boot, number, settings
        self.make_shard = make_shard
        self.counters = {"duplicates_refused": 0, "fenced": 0, "refused": 0}
        self.heartbeat_at = 0.0
        self.progress = 0
        self.stopped = False
        self.diverged = ""  # how this copy differs from the primary's; such a server no longer takes part
        self._forget()

    def _forget(self) -> None:
        """Discard all state and the membership."""
        self.shard: Shard = self.make_shard()
        self.membership: messages.Membership | None = None
        self.pending: messages.Membership | None = None  # a membership that waits until its saved cut is loaded
        self.restored = NO_STATE  # the restore term of the state held
        self.primary = False
        self.index = 0  # the last log entry applied here
        self.unsent: deque[tuple[float, messages.Replicate]] = deque()  # not acknowledged by the backup
        self.copied_at = float("-inf")  # when it last acknowledged one of them, or its whole state
        self.early: dict[int, messages.Replicate] = {}  # entries that arrived before an earlier one
        self.held: deque[tuple[int, Outcome]] = deque()  # answers that wait for the backup
        self.asked: set[object] = set()  # the requests that these answer
        self.unhurried: dict[int, effects.Send] = {}  # by worker, the answer to its last push, sent at the next tick
        self.transfer: messages.Transfer | None = None  # what the new backup receives before any entry
        self.transfer_at = 0.0
        # By worker; with what Pulled.ahead said if the answer has been sent ahead of the commit, else 0.
        self.waiting: dict[int, tuple[messages.Pull, int]] = {}
        self.order: messages.SaveCut | None = None  # the newest cut to save
        self.cut_saved: messages.CutSaved | None = None

    @property
    def term(self) -> int:
        """The term this server is in; -1 before the first."""
        return self.membership.term if self.membership else -1

    def handle(self, message: messages.Message, now: float) -> tuple[list[effects.Send], list[effects.Effect]]:
        """Handle one message; return what to send after the effects are done."""
        out = effects.Output()
        action = _ACTIONS.get(type(message))
        out_of_service = self.stopped or (self.diverged and not isinstance(message, messages.Tick))
        if action is not None and (not out_of_service or isinstance(message, messages.StopRun)):
            self.progress += not isinstance(message, messages.Tick | messages.GetReady)
            action(self, message, now, out)
        return out.replies, out.effects

    # Membership.

    def _tick(self, message: messages.Tick, now: float, out: effects.Output) -> None:
        if now >= self.heartbeat_at:
            self.heartbeat_at = now + self.settings.timers.heartbeat
            if self.diverged:
                out.send(SCHEDULER, messages.Diverged(self.name, self.boot, self.diverged))
            elif self.membership is None and self.pending is None:
                out.send(SCHEDULER, messages.Register(self.name, self.boot))
            else:
                out.send(SCHEDULER, messages.Heartbeat(self.name, self.boot, self.term, self.progress, False))
        if self.primary:
            self._retry(now, out)
            out.replies += self.unhurried.values()
            self.unhurried.clear()

    def _retry(self, now: float, out: effects.Output) -> None:
        """Send again what the backup has not acknowledged, if it has acknowledged nothing for a while.

        While it acknowledges one entry after the other, they are only slow to arrive, and copies would slow them more.
        """
        due = now - self.settings.timers.retry
        if self.transfer is not None:
            if self.transfer_at <= due:
                self._send_transfer(now, out)
        elif self.unsent and max(self.unsent[0][0], self.copied_at) <= due:
            self.unsent = deque((now, replace(entry, term=self.term)) for _, entry in self.unsent)
            for _, entry in list(self.unsent)[:MAX_EARLY]:
                out.send(self._place.backup, entry)

    @property
    def _place(self) -> messages.ShardPlace:
        assert self.membership is not None
        return self.membership.shards[self.number]

    def _on_membership(self, membership: messages.Membership, now: float, out: effects.Output) -> None:
        newest = max(self.term, self.pending.term if self.pending else -1)
        if membership.term < newest:
            return
        if membership.term == newest:
            if self.primary and self.pending is None:
                self._tell_entered(messages.NoOp(), now, out)
            return
        place = membership.shards[self.number]
        me = (self.name, self.boot)
        if me not in ((place.primary, place.primary_boot), (place.backup, place.backup_boot)):
            self._leave(out)
        elif self.restored < membership.restore_term and (place.primary == self.name or place.synced):
            self._restore(membership, now, out)
        elif self.restored < membership.restore_term:
            # Its log belongs to the time before the rollback: acknowledging by that index would be wrong.
            self._forget()
            self._enter(membership, now, out)
        else:
            self._enter(membership, now, out)

    def _fenced(self, fenced: messages.Fenced, now: float, out: effects.Output) -> None:
        """Register with a larger boot number than that of an earlier start."""
        if fenced.boot == self.boot and self.membership is None and self.pending is None:
            self.boot = max(self.boot, fenced.newest) + 1
            out.send(SCHEDULER, messages.Register(self.name, self.boot))

    def _leave(self, out: effects.Output) -> None:
        """Start over with a new boot number: another copy has replaced this one."""
        if self.membership is not None or self.pending is not None:
            self._forget()
            self.boot += 1
            out.send(SCHEDULER, messages.Register(self.name, self.boot))

    def _restore(self, membership: messages.Membership, now: float, out: effects.Output) -> None:
        self._forget()
        if membership.restore:
            self.pending = membership
            out.do(effects.Load(shard_file(membership.restore, self.number)))
        else:
            self.restored = membership.restore_term
            self._enter(membership, now, out)

    def _loaded(self, loaded: messages.Loaded, now: float, out: effects.Output) -> None:
        membership = self.pending
        if membership is None or loaded.name != shard_file(membership.restore, self.number):
            return
        state = loaded.content
        if not isinstance(state, messages.ShardState):
            out.do(effects.Exit(-1, f"{loaded.name} is missing or damaged, although its saved cut is complete."))
            return
        self.shard.adopt(replace(state, term=0, staged=()))
        self.pending, self.restored = None, membership.restore_term
        self._enter(membership, now, out)

    def _enter(self, membership: messages.Membership, now: float, out: effects.Output) -> None:
        """Enter the term of `membership`; a new backup receives its state from the primary."""
        before = self._place if self.membership else None
        self.membership, self.pending, self.early = membership, None, {}
        place = self._place
        if place.primary != self.name:
            self.primary = False
            self.unhurried.clear()
            return
        self.primary = True
        for push in self.shard.staged.values():
            self._pull_next(push)
        out.do(effects.Leads(self.number, membership.term))
        if before is None or (before.backup, before.backup_boot) != (place.backup, place.backup_boot):
            self._change_backup(now, out)
        elif place.synced:
            self.transfer = None
        self._tell_entered(messages.SetMembers(membership.term, membership.members), now, out)

    def _tell_entered(self, entry: messages.Entry, now: float, out: effects.Output) -> None:
        """Submit `entry`, with which the scheduler is told that this primary has entered the term."""
        self._submit(entry, Outcome({(messages.Membership, self.term)}), now, out, acknowledge_membership=True)

    def _change_backup(self, now: float, out: effects.Output) -> None:
        self.unsent.clear()
        self.transfer = None
        if self._place.backup and not self._place.synced:
            self._transfer(now, out)
        elif not self._place.backup:
            self._release(self.index, out)

    # The log and its copy.

    def _submit(
        self,
        entry: messages.Entry,
        extra: Outcome,
        now: float,
        out: effects.Output,
        *,
        acknowledge_membership: bool = False,
    ) -> None:
        """Apply `entry` and copy it to the backup; release its outcome and `extra` once the backup has it.

        A request that is repeated while its answer waits for the backup is answered with that one. An entry for each
        would fill a slow connection to the backup, so that answers wait longer and more requests are repeated.
        """
        if extra.requests and extra.requests <= self.asked:
            return
        outcome = self.shard.apply(entry)
        if self._brings_pushes(entry):
            out.do(effects.Continue(messages.GetReady()))
            if not self._place.backup:  # which would tell the scheduler
                told = Outcome()
                self._tell_staged(told)
                outcome.replies = told.replies + outcome.replies
        outcome.add(extra)
        if acknowledge_membership:
            outcome.send(SCHEDULER, self._membership_ack())
        if self.waiting and not isinstance(entry, messages.NoOp):
            self._answer_waiting(outcome)
        self.index += 1
        if self._place.backup:
            self.held.append((self.index, outcome))
            self.asked |= outcome.requests
            record = messages.Replicate(self.number, self.term, self.index, self.shard.chain, entry)
            self.unsent.append((now, record))
            if self.transfer is None:
                out.send(self._place.backup, record)
        else:
            self._let_go(outcome, out)

    def _let_go(self, outcome: Outcome, out: effects.Output) -> None:
        """Pass on an outcome, but not yet the answers to pushes that tell their workers nothing new.

        The next lease tells a worker that its push is on all shards, unless another slice of the step waits for it.
        """
        out.effects += outcome.effects
        unhurried = self._lease_tells_of_pushes()
        for reply in outcome.replies:
            answer = reply.message
            if unhurried and isinstance(answer, messages.PushAck) and answer.status == "staged":
                self.unhurried[answer.worker] = reply
            else:
                out.replies.append(reply)

    def _lease_tells_of_pushes(self) -> bool:
        """Return whether a worker is granted its next lease only when its push is on all shards."""
        return self.settings.shards_report and len(self.shard.members) >= self.settings.num_slices

    def _brings_pushes(self, entry: messages.Entry) -> bool:
        """Return whether the next step has more pushes with `entry`, which is one, or commits the step before.

        Since params travel ahead of their commit, so may pushes that were made of them.
        """
        return isinstance(entry, messages.Push | messages.Commit | messages.Finish) and self.shard.has_pushes()

    def _membership_ack(self) -> messages.MembershipAck:
        shard = self.shard
        return messages.MembershipAck(
            self.number, self.name, self.boot, self.term, shard.version, shard.front, shard.seen_rows()
        )

    def _transfer(self, now: float, out: effects.Output) -> None:
        state = self.shard.export()
        self.transfer = messages.Transfer(self.number, self.term, self.index, state)
        self._send_transfer(now, out)

    def _send_transfer(self, now: float, out: effects.Output) -> None:
        """Send the state, always that of one index: newer ones would overtake the answer if it takes long to send."""
        assert self.transfer is not None
        self.transfer, self.transfer_at = replace(self.transfer, term=self.term), now
        out.send(self._place.backup, self.transfer)

    def _release(self, index: int, out: effects.Output) -> None:
        while self.held and self.held[0][0] <= index:
            outcome = self.held.popleft()[1]
            self.asked -= outcome.requests
            self._let_go(outcome, out)

    def _replicated(self, answer: messages.Replicated, now: float, out: effects.Output) -> None:
        if not self.primary or answer.term != self.term:
            return
        place = self._place
        while self.unsent and self.unsent[0][1].index <= answer.index:
            self.unsent.popleft()
            self.copied_at = now
        if self.transfer is not None and answer.index >= self.transfer.index:
            self.transfer, self.copied_at = None, now
            for _, entry in self.unsent:
                out.send(place.backup, replace(entry, term=self.term))
        if self.transfer is None:
            self._release(answer.index, out)
            if not place.synced:
                out.send(SCHEDULER, messages.Synced(self.number, self.term, place.backup, place.backup_boot))

    def _is_my_primary(self, term: int) -> bool:
        """Return whether the primary of `term` is the one that this backup follows.

        A term has one primary and one backup of each shard, down to their boot numbers, so it says who sent a message.
        """
        return self.membership is not None and not self.primary and term == self.term

    def _replicate(self, record: messages.Replicate, now: float, out: effects.Output) -> None:
        if not self._is_my_primary(record.term) or self.restored == NO_STATE:
            return
        if self.index < record.index <= self.index + MAX_EARLY:
            self.early[record.index] = record
        while (entry := self.early.pop(self.index + 1, None)) is not None:
            out.effects += self.shard.apply(entry.entry).effects
            self.index += 1
            if self.shard.chain != entry.chain:
                self.diverged = f"The copies of shard {self.number} differ after update {self.shard.version}."
                out.send(SCHEDULER, messages.Diverged(self.name, self.boot, self.diverged))
                return
            if self._brings_pushes(entry.entry):
                self._tell_staged(out)  # now that both copies have it
                out.do(effects.Continue(messages.GetReady()))
        self._acknowledge(out)

    def _adopt(self, transfer: messages.Transfer, now: float, out: effects.Output) -> None:
        if not self._is_my_primary(transfer.term):
            return
        if self.restored == NO_STATE or self.index < transfer.index:
            assert self.membership is not None
            self.shard.adopt(transfer.state)
            self.index, self.restored = transfer.index, self.membership.restore_term
            self.early = {}
        self._acknowledge(out)

    def _acknowledge(self, out: effects.Output) -> None:
        answer = messages.Replicated(self.number, self.term, self.index)
        out.send(self._place.primary, answer)

    # Workers.

    def _push(self, push: messages.Push, now: float, out: effects.Output) -> None:
        if not self.primary:
            return
        reason = self.shard.complaint(push)
        if reason:
            self.counters["refused"] += 1
            out.send(worker_name(push.worker), ack(push, "refused", reason))
            return
        status = self.shard.verdict(push)
        if status in ("staged", "applied"):
            self._submit(push, Outcome({(messages.Push, *sums.identity(push))}), now, out)
            self._pull_next(push)
            return
        if status != "obsolete":
            self.counters["fenced" if status == "fenced" else "duplicates_refused"] += 1
        refusal = Outcome({(messages.Push, *sums.identity(push))})
        if status == "duplicate":
            self._tell_staged(refusal)
            self._pull_next(push)
        refusal.send(worker_name(push.worker), ack(push, status))
        self._submit(messages.NoOp(), refusal, now, out)

    def _pull_next(self, push: messages.Push) -> None:
        """Note that a worker waits for the params of the step after its push; a Pull for that would only cost time."""
        step = push.lease.step + 1
        if self.settings.synchronous and step > self.shard.version:
            ahead = messages.Pull(self.number, push.worker, push.incarnation, push.sequence + 1, step, push.clock)
            self.waiting[push.worker] = ahead, 0

    def _tell_staged(self, outcome: effects.Output) -> None:
        """Tell the scheduler once the next step is complete here, where it decides with that."""
        note = self.shard.staged_note() if self.settings.shards_report else None
        if note is not None:
            outcome.send(SCHEDULER, note)

    def _get_ready(self, message: messages.GetReady, now: float, out: effects.Output) -> None:
        self.shard.get_ready()
        made = self.shard.ahead()
        if made is not None and self.primary:
            self._send_ahead(*made, out)

    def _send_ahead(self, fingerprint: int, params: sums.Arrays, out: effects.Output) -> None:
        for number, (pull, has) in self.waiting.items():
            if pull.version == self.shard.version + 1 and has != fingerprint:
                self.waiting[number] = pull, fingerprint
                out.send(worker_name(number), _pulled(pull, pull.version, params, fingerprint))

    def _pull(self, pull: messages.Pull, now: float, out: effects.Output) -> None:
        if not self.primary or not self.shard.is_member(pull.worker, pull.incarnation):
            return
        if self.shard.may_read(pull):
            self.waiting.pop(pull.worker, None)
            self._serve(pull, now, out)
        else:
            self.waiting[pull.worker] = pull, 0

    def _answer_waiting(self, outcome: Outcome) -> None:
        """Answer the pulls that waited for an entry, with it: its copy shows as well who the primary is."""
        for pull, has in list(self.waiting.values()):
            if not self.shard.is_member(pull.worker, pull.incarnation):
                del self.waiting[pull.worker]
            elif self.shard.may_read(pull):
                del self.waiting[pull.worker]
                self._answer(pull, outcome, has)

    def _serve(self, pull: messages.Pull, now: float, out: effects.Output) -> None:
        answer = Outcome()
        self._answer(pull, answer)
        self._submit(messages.NoOp(), answer, now, out)

    def _answer(self, pull: messages.Pull, answer: Outcome, has: int = 0) -> None:
        """Answer a pull, unless the worker has the params already, as those of the fingerprint `has`."""
        shard = self.shard
        answer.requests.add(pull)
        if not has or has != shard.made_of:
            answer.send(worker_name(pull.worker), _pulled(pull, shard.version, shard.params))
        answer.do(effects.Served(self.number, self.term, pull.worker, pull.clock, shard.version, shard.chain))

    # The scheduler.

    def _commit(self, commit: messages.Commit, now: float, out: effects.Output) -> None:
        if not self.primary or commit.term != self.term:
            return
        if commit.step > self.shard.version:
            whole = self.shard.spelled_out(commit)
            if whole is not None:  # else the scheduler repeats it with its list
                self._submit(whole, Outcome({(messages.Commit, commit.step)}), now, out)
        else:
            known = Outcome({(messages.Commit, commit.step)})
            known.send(SCHEDULER, messages.CommitAck(self.term, self.number, self.shard.version, self.shard.squares))
            self._submit(messages.NoOp(), known, now, out)

    def _finish(self, finish: messages.Finish, now: float, out: effects.Output) -> None:
        if self.primary and finish.term == self.term:
            self._submit(finish, Outcome({(messages.Finish, finish.step)}), now, out)

    def _read(self, read: messages.Read, now: float, out: effects.Output) -> None:
        if not self.primary or read.term != self.term:
            return  # it may have rolled back since the offer: the other shards would answer with a later step
        shard = self.shard
        answer = Outcome({read})
        arrays = shard.params if read.part == messages.PARAMS else shard.opt_state
        content = messages.ReadAnswer(
            read.term, self.number, read.number, read.part, shard.version, shard.chain, arrays
        )
        answer.send(OBSERVER, content)
        self._submit(messages.NoOp(), answer, now, out)

    def _save_cut(self, order: messages.SaveCut, now: float, out: effects.Output) -> None:
        if not self.primary or order.term != self.term:
            return
        newest = (self.order.term, self.order.number) if self.order else (-1, -1)
        if (order.term, order.number) > newest:
            self.order, self.cut_saved = order, None
            out.do(effects.Write(shard_file(order.name, self.number), self.shard.export()))
        elif order == self.order and self.cut_saved is not None:
            out.send(SCHEDULER, self.cut_saved)

    def _written(self, written: messages.Written, now: float, out: effects.Output) -> None:
        if self.order is not None and written.name == shard_file(self.order.name, self.number):
            name = self.order.name
            self.cut_saved = messages.CutSaved(self.number, name, written.checksum, written.error)
            out.send(SCHEDULER, self.cut_saved)

    def _stop(self, stop: messages.StopRun, now: float, out: effects.Output) -> None:
        out.send(SCHEDULER, messages.StopAck(self.name))
        if not self.stopped:
            self.stopped = True
            out.do(effects.Exit(stop.step, stop.reason))


def _pulled(pull: messages.Pull, version: int, params: sums.Arrays, ahead: int = 0) -> messages.Pulled:
    return messages.Pulled(pull.shard, pull.worker, pull.incarnation, pull.sequence, version, params, ahead)


_ACTIONS: dict[type, Callable[..., None]] = {
    messages.Tick: Server._tick,
    messages.Membership: Server._on_membership,
    messages.Fenced: Server._fenced,
    messages.GetReady: Server._get_ready,
    messages.Loaded: Server._loaded,
    messages.Written: Server._written,
    messages.Replicated: Server._replicated,
    messages.Replicate: Server._replicate,
    messages.Transfer: Server._adopt,
    messages.Push: Server._push,
    messages.Pull: Server._pull,
    messages.Commit: Server._commit,
    messages.Finish: Server._finish,
    messages.Read: Server._read,
    messages.SaveCut: Server._save_cut,
    messages.StopRun: Server._stop,
}

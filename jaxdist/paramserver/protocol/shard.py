"""A shard of the params with its optimizer: a deterministic state machine that turns log entries into updates.

Params, optimizer state, exactly-once table, clocks and staged pushes are one value (`export` and `adopt`), so a backup
or a file holds all of them or none. Two shards that apply the same entries in the same order have the same bits.
`chain` is a fingerprint of the updates so far and, at every `check_copies_every`-th, of params and optimizer state.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from jaxdist.paramserver.protocol import effects, messages, sums
from jaxdist.paramserver.protocol.settings import SCHEDULER, Settings, worker_name
from jaxdist.paramserver.protocol.sums import Arrays


class Updater(Protocol):
    """The optimizer of one shard. It never changes an array in place, so older arrays stay valid."""

    needs_norm: bool
    num_params: int  # the first blocks are params; the others are model state, which is replaced by its mean

    def init(self, params: Arrays) -> Arrays:
        """Return the optimizer state for blocks `params`."""

    def update(
        self, params: Arrays, opt_state: Arrays, grads: Arrays, *, step: int, scale: float, norm_squared: float
    ) -> tuple[Arrays, Arrays]:
        """Return params and state after one step along mean gradients `grads`.

        Args:
          params: the blocks.
          opt_state: the result of `init` or of the last update.
          grads: the mean gradient, one array for each block.
          step: the number of finished steps, those without an update among them.
          scale: factor on the update.
          norm_squared: squared norm of the mean gradient over all shards; only meaningful with `needs_norm`.
        """


class Outcome(effects.Output):
    """The replies and effects of a log entry, held back until the backup has the entry.

    `requests` name what they answer: anything that two copies of a request have in common, and no others.
    """

    def __init__(self, requests: set[object] | None = None) -> None:
        super().__init__()
        self.requests = requests or set()

    def add(self, other: "Outcome") -> None:
        """Add what `other` holds."""
        self.replies += other.replies
        self.effects += other.effects
        self.requests |= other.requests


def _extend(chain: int, contributors: Sequence[messages.Contributor], version: int) -> int:
    digest = hashlib.blake2b(struct.pack("<Qq", chain, version), digest_size=8)
    for c in contributors:
        digest.update(struct.pack("<5q", c.worker, c.incarnation, c.sequence, c.lease.step, c.lease.slice))
    return int.from_bytes(digest.digest(), "little") >> 1


def _fold(chain: int, arrays: Sequence[np.ndarray]) -> int:
    digest = hashlib.blake2b(struct.pack("<Q", chain), digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return int.from_bytes(digest.digest(), "little") >> 1


def ack(push: messages.Push, status: str, reason: str = "") -> messages.PushAck:
    """Return the answer to `push`."""
    return messages.PushAck(push.shard, push.worker, push.incarnation, push.sequence, status, reason)


class Shard:
    """One shard: a function of its log."""

    def __init__(self, *, shard: int, settings: Settings, updater: Updater, params: Arrays) -> None:
        self.shard, self.settings, self.updater = shard, settings, updater
        self.adopt(messages.ShardState(0, 0, 0, params, updater.init(params), (), (), 0, (), (), (), None))

    # The unit of durability.

    def adopt(self, state: messages.ShardState) -> None:
        """Become `state`."""
        self.version, self.chain, self.term = state.version, state.chain, state.term
        self.params, self.opt_state = state.params, state.opt_state
        self.seen = {row.worker: row for row in state.seen}
        self.clocks, self.front = dict(state.clocks), state.front
        self.members = {member.worker: member for member in state.members}
        self.staged = {sums.identity(push): push for push in state.staged}
        self.summed, self.summing = state.summed, state.summing
        # Not part of the state:
        self.squares = -1.0  # squared norm of the last mean gradient; only reported
        self.made_of = 0  # the fingerprint of the pushes that the last step was made of, if it was made ahead
        self._forget_what_is_ready()

    def _forget_what_is_ready(self) -> None:
        self._by_slice: dict[int, messages.Push] = {}  # of the next step
        self._sums = sums.PushSums(self.params, self.updater.num_params)
        self._ready: sums.Ready | None = None
        for push in self.staged.values():
            self._note_slice(push)

    def _note_slice(self, push: messages.Push) -> None:
        if push.lease.step == self.version:
            self._by_slice[push.lease.slice] = push  # a later one is of a worker that took over the lease

    def export(self) -> messages.ShardState:
        """Return the whole state; later updates do not change it."""
        return messages.ShardState(
            self.version,
            self.chain,
            self.term,
            self.params,
            self.opt_state,
            self.seen_rows(),
            tuple(self.clocks.items()),
            self.front,
            tuple(self.members.values()),
            tuple(self.staged.values()),
            self.summed,
            self.summing,
        )

    def seen_rows(self) -> tuple[messages.Seen, ...]:
        """Return the exactly-once table."""
        return tuple(row for _, row in sorted(self.seen.items()))

    # Queries.

    def is_member(self, worker: int, incarnation: int) -> bool:
        """Return whether this incarnation of the worker is a member."""
        member = self.members.get(worker)
        return member is not None and member.incarnation == incarnation

    def may_read(self, pull: messages.Pull) -> bool:
        """Return whether the params hold every update that `pull` must see.

        In bounded mode a reader at clock c sees all updates with clock at most c - max_staleness - 1 (Ho et al., "More
        effective distributed ML via a stale synchronous parallel parameter server", 2013), its own included.
        """
        if self.version < pull.version:
            return False
        if self.settings.mode != "bounded" or self.settings.synchronous:
            return True
        return min(self.clocks.values(), default=pull.clock) >= pull.clock - self.settings.max_staleness

    def complaint(self, push: messages.Push) -> str:
        """Return why `push` does not fit this shard, as a sentence; empty if it does."""
        if len(push.pieces) != len(self.params):
            return f"A push needs {len(self.params)} pieces, one for each block, got {len(push.pieces)}."
        for number, (piece, param) in enumerate(zip(push.pieces, self.params)):
            values = piece.values if isinstance(piece, messages.Rows) else piece
            if values.dtype != param.dtype:
                return f"Block {number} has dtype {param.dtype}, its piece has {values.dtype}."
            if isinstance(piece, messages.Rows):
                if not _rows_fit(piece, param):
                    return f"The rows for block {number} do not fit its {param.size} elements."
            elif values.shape != param.shape:
                return f"Block {number} has shape {param.shape}, its piece has {values.shape}."
            if push.finite and values.size and not _is_finite(values):
                return f"The push is declared finite, but its piece for block {number} is not."
        fewest = min(push.count, push.num_examples)
        return "" if fewest >= 0 else f"A push must count at least 0 examples, got {fewest}."

    def verdict(self, push: messages.Push) -> str:
        """Return the status that `push` would get now: fenced, duplicate, obsolete, staged or applied."""
        if not self.is_member(push.worker, push.incarnation):
            return "fenced"
        row = self.seen.get(push.worker)
        applied = row is not None and (push.incarnation, push.sequence) <= (row.incarnation, row.sequence)
        if applied or sums.identity(push) in self.staged:
            return "duplicate"
        if not self.settings.synchronous:
            return "applied"
        return "obsolete" if push.lease.step < self.version or self.summing is not None else "staged"

    # Log entries.

    def apply(self, entry: messages.Entry) -> Outcome:
        """Apply one log entry; the same entries in the same order give the same bits on every copy."""
        outcome = Outcome()
        if isinstance(entry, messages.Push):
            self._push(outcome, entry)
        elif isinstance(entry, messages.Commit):
            self._commit(outcome, entry)
        elif isinstance(entry, messages.Finish):
            self._finish(outcome, entry)
        elif isinstance(entry, messages.SetMembers):
            self._set_members(entry)
        return outcome

    def _push(self, outcome: Outcome, push: messages.Push) -> None:
        status = self.verdict(push)
        assert status in ("staged", "applied"), f"a push that is {status} is in the log"
        if status == "staged":
            self.staged[sums.identity(push)] = push
            self._note_slice(push)
        else:
            self._apply_push(outcome, push)
        outcome.send(worker_name(push.worker), ack(push, status))

    def _apply_push(self, outcome: Outcome, push: messages.Push) -> None:
        staleness = self.version - push.version
        scale = 1.0 / (1.0 + staleness) if self.settings.damp_staleness else 1.0
        contributor = messages.Contributor(push.worker, push.incarnation, push.sequence, push.lease)
        skip = not push.finite or push.count <= 0
        if not skip:
            grads = sums.mean([push], self.params, self.updater.num_params)
            self._keep(self._update(grads, scale=scale, norm_squared=push.norm_squared))
        self.clocks[push.worker] = max(push.clock + 1, self.clocks.get(push.worker, 0))
        self.front = max(self.front, push.clock + 1)
        self._record(outcome, (contributor,), push.clock, staleness, skip)

    def get_ready(self) -> None:
        """Add up the pushes of the next step that have arrived, and after the last one make the update.

        It is used if the commit names these pushes. That saves the time in which the commit is decided and logged.
        """
        if self.summing is not None or self._ready is not None:
            return
        while (push := self._by_slice.get(len(self._sums.added))) is not None:
            self._sums.add(push)
        made = self._sums
        if len(made.added) < self.settings.num_slices or not made.finite or made.count <= 0:
            return
        mean = made.mean()
        updated = None if self.updater.needs_norm else self._update(mean, scale=1.0, norm_squared=0.0)
        self._ready = sums.Ready(tuple(made.added), mean, updated)

    def ahead(self) -> tuple[int, Arrays] | None:
        """Return the params after the next step, if they are made, and the fingerprint of its pushes."""
        ready = self._ready
        return None if ready is None or ready.updated is None else (ready.fingerprint, ready.updated[0])

    def has_pushes(self) -> bool:
        """Return whether any push of the next step has arrived."""
        return bool(self._by_slice)

    def staged_note(self) -> messages.Staged | None:
        """Return what tells the scheduler that the next step is complete here; None if it is not."""
        if len(self._by_slice) < self.settings.num_slices or self.summing is not None:
            return None
        return messages.Staged(self.shard, self.version, sums.fingerprint(self._in_slice_order()))

    def _in_slice_order(self) -> list[messages.Push]:
        return [self._by_slice[slice_] for slice_ in sorted(self._by_slice)]

    def spelled_out(self, commit: messages.Commit) -> messages.Commit | None:
        """Return a commit with the list of its pushes; None if it names others than are complete here."""
        if not commit.fingerprint:
            return commit
        pushes = self._in_slice_order()
        if commit.step != self.version + 1 or sums.fingerprint(pushes) != commit.fingerprint:
            return None
        contributors = tuple(messages.Contributor(p.worker, p.incarnation, p.sequence, p.lease) for p in pushes)
        return replace(commit, contributors=contributors, fingerprint=0)

    def _ready_for(self, commit: messages.Commit) -> sums.Ready | None:
        added = tuple(map(sums.identity, self._ordered(commit)))
        return self._ready if self._ready is not None and self._ready.added == added and not commit.skip else None

    def _commit(self, outcome: Outcome, commit: messages.Commit) -> None:
        if self.summing is None:
            assert commit.step == self.version + 1, f"commit {commit.step} at version {self.version}"
            pushes = [self.staged[sums.identity(c)] for c in self._ordered(commit)]
            self.summing = commit
            self.summed = () if commit.skip else self._mean_of(commit, pushes)
            self.squares = -1.0 if commit.skip else sum(float(np.vdot(g, g).real) for g in self._grads())
        if self.updater.needs_norm and not commit.skip:
            wide = (g.astype(np.promote_types(g.dtype, np.float64)) for g in self._grads())
            squares = tuple(float(np.vdot(g, g).real) for g in wide)
            outcome.send(SCHEDULER, messages.Norms(commit.term, self.shard, commit.step, squares))
        else:
            self._finish_commit(outcome, commit.term, 0.0)

    def _mean_of(self, commit: messages.Commit, pushes: Sequence[messages.Push]) -> Arrays:
        ready = self._ready_for(commit)
        return ready.mean if ready is not None else sums.mean(pushes, self.params, self.updater.num_params)

    def _grads(self) -> Arrays:
        """Return the blocks of the mean gradient: model state, the blocks after them, has no part in its norm."""
        return self.summed[: self.updater.num_params]

    def _finish(self, outcome: Outcome, finish: messages.Finish) -> None:
        if self.summing is not None and finish.step == self.summing.step:
            self._finish_commit(outcome, finish.term, finish.norm_squared)
        elif finish.step <= self.version:
            self._tell_applied(outcome, finish.term)

    def _finish_commit(self, outcome: Outcome, term: int, norm_squared: float) -> None:
        commit = self.summing
        assert commit is not None
        ready = self._ready_for(commit)
        self.made_of = 0
        if ready is not None and ready.updated is not None:
            self._keep(ready.updated)
            self.made_of = ready.fingerprint
        elif not commit.skip:
            self._keep(self._update(self.summed, scale=1.0, norm_squared=norm_squared))
        self.summing, self.summed = None, ()
        self._record(outcome, commit.contributors, messages.NO_CLOCK, 0, commit.skip)
        self.staged = {key: push for key, push in self.staged.items() if push.lease.step >= self.version}
        self._forget_what_is_ready()
        self._tell_applied(outcome, term)

    def _tell_applied(self, outcome: Outcome, term: int) -> None:
        outcome.send(SCHEDULER, messages.CommitAck(term, self.shard, self.version, self.squares))

    def _ordered(self, commit: messages.Commit) -> list[messages.Contributor]:
        # By slice, so that the sum has the same bits whichever worker computed a slice.
        return sorted(commit.contributors, key=lambda c: c.lease.slice)

    def _update(self, grads: Arrays, *, scale: float, norm_squared: float) -> tuple[Arrays, Arrays]:
        return self.updater.update(
            self.params, self.opt_state, grads, step=self.version, scale=scale, norm_squared=norm_squared
        )

    def _keep(self, updated: tuple[Arrays, Arrays]) -> None:
        self.params, self.opt_state = updated

    def _record(
        self,
        outcome: Outcome,
        contributors: tuple[messages.Contributor, ...],
        clock: int,
        staleness: int,
        skipped: bool,
    ) -> None:
        """Mark the pushes as applied, in the same entry as the update of the params."""
        for c in contributors:
            row = self.seen.get(c.worker)
            if row is None or (row.incarnation, row.sequence) < (c.incarnation, c.sequence):
                self.seen[c.worker] = messages.Seen(c.worker, c.incarnation, c.sequence, c.lease.step)
        before = self.chain
        self.version += 1
        self.chain = _extend(before, contributors, self.version)
        every = self.settings.check_copies_every
        if self.settings.replicated and every and self.version % every == 0:
            self.chain = _fold(self.chain, (*self.params, *self.opt_state))
        applied = effects.Applied(
            self.shard, self.term, self.version, before, self.chain, contributors, clock, staleness, skipped
        )
        outcome.do(applied)

    def _set_members(self, entry: messages.SetMembers) -> None:
        if entry.term <= self.term:
            return
        known, self.term = self.members, entry.term
        self.members = {member.worker: member for member in entry.members}
        clocks = {}
        for worker, member in self.members.items():
            stays = worker in known and known[worker].incarnation == member.incarnation
            # A bench floor is not a clock that the member reached; on its return the floor it gets then counts.
            held = self.clocks[worker] if stays and known[worker].floor < messages.BENCHED else member.floor
            clocks[worker] = max(member.floor, held)
            self.front = max(self.front, member.floor % messages.BENCHED)
        self.clocks = clocks


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype.kind == "c":
        return _is_finite(values.real) and _is_finite(values.imag)
    # One pass over the memory. If only the squares overflow, the two passes below give the right answer.
    if values.dtype.char in "fd" and math.isfinite(np.vdot(values, values)):
        return True
    # The extremes are not finite if any value is not, and need no temporary array.
    return bool(np.isfinite(values.max()) and np.isfinite(values.min()))


def _rows_fit(piece: messages.Rows, param: np.ndarray) -> bool:
    if piece.values.ndim != 2 or piece.ids.ndim != 1 or len(piece.ids) != len(piece.values):
        return False
    width = piece.values.shape[1]
    if not width or param.size % width or piece.ids.dtype.kind != "i":
        return False
    return bool(((piece.ids >= 0) & (piece.ids < param.size // width)).all())

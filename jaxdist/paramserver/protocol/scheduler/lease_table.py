"""The lease table: which examples are trained, which are leased, and which are next.

Step t (from 0) owns the examples at positions [start, stop) of an epoch, the same for every strategy. In sync mode its
batch is divided into slices, one lease each; otherwise one lease is the whole batch. Only a committed push counts as
trained, so the lease of a worker that died is granted again.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence

from jaxdist.paramserver.protocol.messages import Contributor, Done, Lease, Metric, Trained
from jaxdist.paramserver.protocol.settings import Settings

FRESH = Trained(0, ())

MayCopy = Callable[[Sequence[int]], bool]


def lease(settings: Settings, step: int, slice_: int = 0) -> Lease:
    """Return the examples of one slice of `step`; the slices of a step are disjoint and cover its batch."""
    epoch, within = divmod(step, settings.steps_per_epoch)
    start = within * settings.global_batch_size
    size = min(settings.global_batch_size, settings.num_examples - start)
    slices = settings.num_slices
    return Lease(step, slice_, epoch, start + size * slice_ // slices, start + size * (slice_ + 1) // slices)


def contributor(done: Done) -> Contributor:
    """Return the push that `done` reports."""
    return Contributor(done.worker, done.incarnation, done.sequence, done.lease)


def add_metrics(lists: Iterable[Iterable[Metric]]) -> tuple[Metric, ...]:
    """Return the sum of the given metrics by name: totals and counts added in order."""
    sums: dict[str, tuple[float, float]] = {}
    for metrics in lists:
        for metric in metrics:
            total, count = sums.get(metric.name, (0.0, 0.0))
            sums[metric.name] = (total + metric.total, count + metric.count)
    return tuple(Metric(name, *both) for name, both in sums.items())


class StepLeases:
    """The lease table of sync mode: one step at a time, its slices leased until all pushes have arrived.

    Granting and finishing a lease costs the same for any number of workers, unless backup workers look for copies.
    """

    def __init__(self, settings: Settings, state: Trained = FRESH) -> None:
        self.settings, self.step = settings, state.step
        self._usual: dict[int, int] = {}  # worker -> the slice that it leased last
        self._open()

    def _open(self) -> None:
        slices = range(self.settings.num_slices)
        self.holders: list[list[int]] = [[] for _ in slices]
        self.done: dict[int, Done] = {}
        self.computed: dict[int, Done] = {}  # reported by their workers, but not known to be on every shard
        self.missing = dict.fromkeys(slices)  # slices without a push, in order
        self.free = list(slices)  # a heap of slices without a holder; see _next_free

    def trained(self) -> Trained:
        """Return the steps that are trained."""
        return Trained(self.step, ())

    def is_idle(self) -> bool:
        """Return whether no lease can be granted now."""
        return self._next_free() is None and (not self.settings.backup_workers or not self.missing)

    def is_under_way(self) -> bool:
        """Return whether the step can be committed without another lease: every slice has a push or a holder."""
        return self._next_free() is None

    def _next_free(self) -> int | None:
        while self.free and (self.holders[self.free[0]] or self.free[0] in self.done):
            heapq.heappop(self.free)
        return self.free[0] if self.free else None

    def pick(self, worker: int, may_copy: MayCopy = lambda holders: True) -> Lease | None:
        """Lease a slice to `worker` and return it: a free one or, with backup workers, one that others hold too.

        A slice that others hold is leased again only if `may_copy(its holders)`.
        """
        chosen = self._usual.get(worker)  # it reads the examples of that slice ahead
        if chosen is None or chosen in self.done or self.holders[chosen]:
            chosen = self._next_free()
        if chosen is None and self.settings.backup_workers:
            chosen = self._pick_copy(worker, may_copy)
        if chosen is None:
            return None
        self.holders[chosen].append(worker)
        self._usual[worker] = chosen
        return lease(self.settings, self.step, chosen)

    def _pick_copy(self, worker: int, may_copy: MayCopy) -> int | None:
        """Return the missing slice with the fewest holders; among equals the first, which has been leased longest."""
        held = [(len(self.holders[i]), i) for i in self.missing if worker not in self.holders[i]]
        few = sorted((number, i) for number, i in held if number <= self.settings.backup_workers)
        return next((i for _, i in few if may_copy(self.holders[i])), None)

    def hold(self, worker: int, held: Lease) -> None:
        """Note that `worker` holds this lease, as it reports to a restarted scheduler."""
        if held.step == self.step and worker not in self.holders[held.slice]:
            self.holders[held.slice].append(worker)

    def give_back(self, worker: int, held: Lease) -> None:
        """Take back a lease that `worker` will not finish."""
        if held.step == self.step and worker in self.holders[held.slice]:
            self.holders[held.slice].remove(worker)
            heapq.heappush(self.free, held.slice)  # which is passed over while others hold it

    def leave(self, worker: int) -> None:
        """Forget what a worker has computed that is not known to be on every shard: it has left."""
        self.computed = {slice_: done for slice_, done in self.computed.items() if done.worker != worker}

    def note_computed(self, done: Done) -> bool:
        """Note a push that may not be on every shard yet; return whether each slice of the step has one now."""
        if done.lease.step == self.step and done.lease.slice not in self.done:
            self.computed[done.lease.slice] = done
        return len(self.computed) + len(self.done) == self.settings.num_slices

    def finish(self, done: Done) -> None:
        """Note that a slice's push is staged on every shard; the first push of a slice counts."""
        if done.lease.step == self.step:
            self.done.setdefault(done.lease.slice, done)
            self.computed.pop(done.lease.slice, None)
            self.missing.pop(done.lease.slice, None)

    def is_complete(self) -> bool:
        """Return whether every slice has a push."""
        return not self.missing

    def contributors(self) -> tuple[Contributor, ...]:
        """Return one push for each slice, in slice order."""
        return tuple(contributor(self.done[i]) for i in sorted(self.done))

    def finite(self) -> bool:
        """Return whether every value of the pushes that arrived is finite."""
        return all(done.finite for done in self.done.values())

    def count(self) -> float:
        """Return how many examples the pushes that arrived count."""
        return sum(done.count for done in self.done.values())

    def metrics(self) -> tuple[Metric, ...]:
        """Return the metrics of the step, added in slice order."""
        return add_metrics(self.done[i].metrics for i in sorted(self.done))

    def advance(self) -> None:
        """Begin the next step: this one is committed."""
        self.step += 1
        self._open()


class BatchLeases:
    """The lease table of the bounded and async modes: whole batches, finished in any order."""

    def __init__(self, settings: Settings, state: Trained = FRESH) -> None:
        self.settings = settings
        self.low, self.beyond = state.step, set(state.beyond)
        self.out: dict[int, int] = {}

    @property
    def step(self) -> int:
        """The number of trained batches."""
        return self.low + len(self.beyond)

    def trained(self) -> Trained:
        """Return the steps that are trained."""
        return Trained(self.low, tuple(sorted(self.beyond)))

    def is_done(self, step: int) -> bool:
        """Return whether the batch of `step` is trained."""
        return step < self.low or step in self.beyond

    def next_step(self) -> int | None:
        """Return the first batch that is neither trained nor leased; None when none is left."""
        step = self.low
        while step in self.beyond or step in self.out:
            step += 1
        return step if step < self.settings.max_steps else None

    def is_idle(self) -> bool:
        """Return whether no lease can be granted now."""
        return self.next_step() is None

    def is_under_way(self) -> bool:
        """Return whether a batch may be trained without another lease."""
        return bool(self.out)

    def pick(self, worker: int, may_copy: MayCopy = lambda holders: True) -> Lease | None:
        """Lease the next batch to `worker` and return it; a batch is never leased twice at once."""
        step = self.next_step()
        if step is None:
            return None
        self.out[step] = worker
        return lease(self.settings, step)

    def hold(self, worker: int, held: Lease) -> None:
        """Note that `worker` holds this lease, as it reports to a restarted scheduler."""
        if not self.is_done(held.step):
            self.out[held.step] = worker

    def give_back(self, worker: int, held: Lease) -> None:
        """Take back a lease that `worker` will not finish."""
        if self.out.get(held.step) == worker:
            del self.out[held.step]

    def complete(self, step: int) -> bool:
        """Note that every shard applied the batch of `step`; return whether that is new."""
        if self.is_done(step):
            return False
        self.out.pop(step, None)
        self.beyond.add(step)
        while self.low in self.beyond:
            self.beyond.remove(self.low)
            self.low += 1
        return True

"""Which examples are trained, which are out, which come next: the scheduler's books.

Step t (from 0) owns the examples at positions [start, stop) of a data epoch, the same for every strategy. In the sync
mode its batch is cut into slices, one lease each; otherwise one lease is the whole batch. A lease is only a promise:
the books move when a push is committed and never before, so a lease whose worker died is handed out again.
"""

from collections.abc import Callable, Iterable, Sequence

from jaxdist.paramserver.protocol.journal import LedgerState
from jaxdist.paramserver.protocol.messages import Contributor, Lease, Metric
from jaxdist.paramserver.protocol.settings import Settings

FRESH = LedgerState(0, ())

MayCopy = Callable[[Sequence[int]], bool]


def lease(settings: Settings, step: int, slice_: int = 0) -> Lease:
    """Return the examples of one slice of `step`; the slices of a step are disjoint and cover its batch."""
    epoch, within = divmod(step, settings.steps_per_epoch)
    start = within * settings.global_batch_size
    size = min(settings.global_batch_size, settings.num_examples - start)
    cuts = [start + size * i // settings.num_slices for i in range(settings.num_slices + 1)]
    return Lease(step, slice_, epoch, cuts[slice_], cuts[slice_ + 1])


def add_metrics(lists: Iterable[Iterable[Metric]]) -> tuple[Metric, ...]:
    """Return the means over everything the given means were taken over, by name, totals and counts added in order."""
    sums: dict[str, tuple[float, float]] = {}
    for metrics in lists:
        for metric in metrics:
            total, count = sums.get(metric.name, (0.0, 0.0))
            sums[metric.name] = (total + metric.total, count + metric.count)
    return tuple(Metric(name, *both) for name, both in sums.items())


class StepLedger:
    """The books of the sync mode: the slices of one step are out until all are in."""

    def __init__(self, settings: Settings, state: LedgerState = FRESH) -> None:
        self.settings, self.step = settings, state.step
        self._open()

    def _open(self) -> None:
        self.holders: list[list[int]] = [[] for _ in range(self.settings.num_slices)]
        self.ready: dict[int, tuple[Contributor, bool, tuple[Metric, ...]]] = {}

    def state(self) -> LedgerState:
        """Return what must be remembered."""
        return LedgerState(self.step, ())

    def pick(self, worker: int, may_copy: MayCopy = lambda holders: True) -> Lease | None:
        """Return what `worker` should compute next: a slice nobody has or, with backup workers, another's slice.

        A slice that others have is copied only where `may_copy(its holders)`.
        """
        missing = [
            i
            for i, holders in enumerate(self.holders)
            if i not in self.ready and worker not in holders and (not holders or may_copy(holders))
        ]
        if not missing:
            return None
        # The slice with the fewest workers on it; among equals the first, which has been out longest.
        chosen = min(missing, key=lambda i: (len(self.holders[i]), i))
        if len(self.holders[chosen]) > self.settings.backup_workers:
            return None
        self.holders[chosen].append(worker)
        return lease(self.settings, self.step, chosen)

    def hold(self, worker: int, held: Lease) -> None:
        """Note that `worker` turns out to have this lease."""
        if held.step == self.step and worker not in self.holders[held.slice]:
            self.holders[held.slice].append(worker)

    def give_back(self, worker: int, held: Lease) -> None:
        """Note that `worker` will not finish this lease."""
        if held.step == self.step and worker in self.holders[held.slice]:
            self.holders[held.slice].remove(worker)

    def finish(self, push: Contributor, finite: bool, metrics: tuple[Metric, ...]) -> None:
        """Note that the slice's push is staged on every shard; the first one of a slice counts."""
        if push.lease.step == self.step:
            self.ready.setdefault(push.lease.slice, (push, finite, metrics))

    def contributors(self) -> tuple[Contributor, ...] | None:
        """Return one push for each slice, in slice order, once all are in."""
        if len(self.ready) < self.settings.num_slices:
            return None
        return tuple(self.ready[i][0] for i in range(self.settings.num_slices))

    def finite(self) -> bool:
        """Return True when no push that is in holds a value that is not finite."""
        return all(finite for _, finite, _ in self.ready.values())

    def metrics(self) -> tuple[Metric, ...]:
        """Return the metrics of the step, added in slice order."""
        return add_metrics(self.ready[i][2] for i in sorted(self.ready))

    def advance(self) -> None:
        """The step is committed: open the next."""
        self.step += 1
        self._open()


class BatchLedger:
    """The books of the modes bounded and async: whole batches, finished in any order."""

    def __init__(self, settings: Settings, state: LedgerState = FRESH) -> None:
        self.settings = settings
        self.low, self.beyond = state.step, set(state.beyond)
        self.out: dict[int, int] = {}

    @property
    def step(self) -> int:
        """Batches that are done."""
        return self.low + len(self.beyond)

    def state(self) -> LedgerState:
        """Return what must be remembered."""
        return LedgerState(self.low, tuple(sorted(self.beyond)))

    def is_done(self, step: int) -> bool:
        """Return True when the batch of `step` is committed."""
        return step < self.low or step in self.beyond

    def next_step(self) -> int | None:
        """Return the first batch that is neither done nor out; None when there is none left."""
        step = self.low
        while step in self.beyond or step in self.out:
            step += 1
        return step if step < self.settings.max_steps else None

    def pick(self, worker: int, may_copy: MayCopy = lambda holders: True) -> Lease | None:
        """Return what `worker` should compute next; a batch is never out twice."""
        step = self.next_step()
        if step is None:
            return None
        self.out[step] = worker
        return lease(self.settings, step)

    def hold(self, worker: int, held: Lease) -> None:
        """Note that `worker` turns out to have this lease."""
        if not self.is_done(held.step):
            self.out[held.step] = worker

    def give_back(self, worker: int, held: Lease) -> None:
        """Note that `worker` will not finish this lease."""
        if self.out.get(held.step) == worker:
            del self.out[held.step]

    def complete(self, step: int) -> bool:
        """Note that every shard applied the batch of `step`; False when that was known."""
        if self.is_done(step):
            return False
        self.out.pop(step, None)
        self.beyond.add(step)
        while self.low in self.beyond:
            self.beyond.remove(self.low)
            self.low += 1
        return True

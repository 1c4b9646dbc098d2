"""What the processes of a job agree on while they train: the step to stop at, and numbers that a clock decides.

Signals and clocks differ from process to process, but all must stop at one step and take snapshots at the same steps.
Process 0 decides. Each decision is valid from a certain step on, and says after how many steps the next one follows; it
is published while the steps before are computed. So, by induction, every process reads the same decision at the same
step, and normally it is available before it is needed.

Decisions go through the coordinator's key-value store, never through a collective. Two programs that communicate
between processes must not run at the same time unless they use the same devices: on CPU devices each waiting
participant occupies a thread of XLA's pool, XLA orders only programs over the same devices, and participants of two
programs that start in different orders in different processes wait for each other forever (docs/guide/processes.md).
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax

from jaxdist.spmd import jax_private

EVERY_SECONDS = 0.25
"""Time between two decisions if steps are shorter; with longer steps there is one decision per step."""
MOST_STEPS = 1000
_WINDOW = 8
"""Steps over which their duration is measured: the loop dispatches up to eight before it waits for the devices."""
_KEPT = 64
"""Decisions that stay in the store. Each is at least a step after the one before, and process 0 is at most eight steps
ahead of what every process has dispatched, so the others have read all earlier ones."""
_TRY_SECONDS = 2.0
"""How long one request for a decision may wait; a process that ends is delayed by at most this time."""
_MEET_MILLISECONDS = 3_600_000
"""How long to wait for a process; one that died is noticed by its missing heartbeat."""
_RUNS = itertools.count()
"""Numbers the agreements of this process: a second run in a program must not read decisions of the first."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is valid from the step at which the decision takes effect.

    Attributes:
      stop: whether training ends after that step.
      numbers: by name, as process 0 measured them when it decided.
      next_after: steps until the next decision takes effect.
    """

    stop: bool
    numbers: Mapping[str, float]
    next_after: int


class Alone:
    """The agreement of a process with itself; see `Shared` for that of several."""

    def stop(self, wanted: Callable[[int], bool]) -> Callable[[int], bool]:
        """Return `wanted`."""
        return wanted

    def number(self, name: str, start: float) -> Callable[[float], float]:
        """Return the function that returns its argument."""
        del name, start
        return lambda number: number

    def meet(self, name: str) -> None:
        """Return at once."""


class Shared:
    """The agreement of several processes; each makes one, and calls its functions at the same steps.

    Process 0 `decides`; the clock measures the time between two decisions.
    """

    def __init__(self, channel: "StoreChannel", *, decides: bool, clock: Callable[[], float] = time.monotonic):
        self._channel, self._decides = channel, decides
        self._pace = _Pace(clock)
        self._measured: dict[str, float] = {}
        self._agreed: Mapping[str, float] = {}
        self._due: int | None = None
        self._asked = False

    def number(self, name: str, start: float) -> Callable[[float], float]:
        """Return `agreed(number)`: what process 0 passed some steps ago, `start` at first; equal at equal steps."""

        def agreed(number: float) -> float:
            self._measured[name] = number
            return self._agreed.get(name, start)

        return agreed

    def stop(self, wanted: Callable[[int], bool]) -> Callable[[int], bool]:
        """Return `stop_requested(step)` for `loop.fit`: true on every process at one step, soon after any wants it."""

        def stop_requested(step: int) -> bool:
            if not self._asked and wanted(step):
                self._asked = True
                self._channel.ask()
            return self._take(step)

        return stop_requested

    def meet(self, name: str) -> None:
        """Return once every process has called this with the same name; each name once in a run."""
        self._channel.meet(name)

    def due(self, step: int) -> bool:
        """Return whether a decision takes effect at `step`."""
        return step == self._due

    def _take(self, step: int) -> bool:
        """Apply the decision that takes effect at `step`, and make the next one; return whether to stop."""
        decision = Decision(False, {}, 1)
        if self._due is not None:
            if not self.due(step):
                return False
            decision = self._channel.receive()
            self._agreed = decision.numbers
        self._due = step + decision.next_after
        if self._decides:
            stop = self._asked or self._channel.asked()
            self._channel.publish(Decision(stop, dict(self._measured), self._pace.steps(step)))
        return decision.stop


class _Pace:
    """Counts how many steps are made in EVERY_SECONDS."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._seen: collections.deque[tuple[int, float]] = collections.deque()

    def steps(self, step: int) -> int:
        """Return the number as measured up to `step`; 1 until enough steps were measured."""
        now = self._clock()
        self._seen.append((step, now))
        while len(self._seen) > 1 and step - self._seen[1][0] >= _WINDOW:
            self._seen.popleft()
        first, then = self._seen[0]
        if step - first < _WINDOW:
            return 1
        return max(1, min(MOST_STEPS, int(EVERY_SECONDS * (step - first) / max(now - then, 1e-9))))


class StoreChannel:
    """A channel through the coordinator's store. A thread uses the store, so that training does not wait for it.

    `store` is that of `jax_private.coordinator_store`. The prefix of its keys is the same on every process, and
    different from that of earlier runs. Process 0 publishes.
    """

    def __init__(self, store: Any, prefix: str, *, process: int):
        self._store, self._prefix, self._process = store, prefix, process
        self._outgoing: queue.SimpleQueue[Decision | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[Decision | Exception] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(1)
        self._asked, self._closed = threading.Event(), threading.Event()
        work = self._write_all if process == 0 else self._read_all
        self._thread = threading.Thread(target=self._run, args=(work,), name="jaxdist-agreement", daemon=True)
        self._thread.start()

    def publish(self, decision: Decision) -> None:
        """Have the thread write the decision; this process reads it from memory."""
        self._incoming.put(decision)
        self._outgoing.put(decision)

    def receive(self) -> Decision:
        """Return the next decision, and have the thread fetch the one after it."""
        item = self._incoming.get()
        if isinstance(item, Exception):
            raise item
        self._wanted.release()
        return item

    def ask(self) -> None:
        """Write the request into the store; called once in a job."""
        self._store.key_value_set(f"{self._prefix}/stop/{self._process}", "")

    def asked(self) -> bool:
        """Return whether the thread has seen a request."""
        return self._asked.is_set()

    def close(self) -> None:
        """End the thread, after what process 0 decided was written."""
        self._closed.set()
        self._outgoing.put(None)
        self._wanted.release()
        self._thread.join()

    def meet(self, name: str) -> None:
        """Return once every process has called this with the same name; each name once."""
        self._store.wait_at_barrier(f"{self._prefix}/{name}", _MEET_MILLISECONDS)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except jax.errors.JaxRuntimeError as error:  # the coordinator has ended; `receive` raises this
            self._incoming.put(error)

    def _write_all(self) -> None:
        for number in itertools.count():
            decision = self._next_to_write()
            if decision is None:
                return
            self._store.key_value_set(self._key(number), json.dumps(dataclasses.asdict(decision)))
            if number >= _KEPT:
                self._store.key_value_delete(self._key(number - _KEPT))
            # Also here, because decisions may follow each other without a pause.
            self._look_for_requests()

    def _next_to_write(self) -> Decision | None:
        """Return the next decision, None at the end; until it comes, look for requests to stop."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._outgoing.get(timeout=EVERY_SECONDS)
            self._look_for_requests()

    def _look_for_requests(self) -> None:
        if not self._asked.is_set() and self._store.key_value_dir_get(f"{self._prefix}/stop/"):
            self._asked.set()

    def _read_all(self) -> None:
        for number in itertools.count():
            self._wanted.acquire()
            text = self._wait_for(self._key(number))
            if text is None:
                return
            self._incoming.put(Decision(**json.loads(text)))

    def _wait_for(self, key: str) -> str | None:
        """Return the value of `key` once it is set, None once this process ends."""
        while not self._closed.is_set():
            try:
                return self._store.blocking_key_value_get(key, int(_TRY_SECONDS * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        return None

    def _key(self, number: int) -> str:
        return f"{self._prefix}/decision/{number}"


Agreement: TypeAlias = Alone | Shared
"""What the processes of a run agree on."""


@contextlib.contextmanager
def of_job() -> Iterator[Agreement]:
    """Yield the agreement of this job's processes for one run; all processes enter it in the same order."""
    if jax.process_count() == 1:
        yield Alone()
        return
    prefix = f"jaxdist/agreement/{next(_RUNS)}"
    channel = StoreChannel(jax_private.coordinator_store(), prefix, process=jax.process_index())
    with contextlib.closing(channel):
        yield Shared(channel, decides=jax.process_index() == 0)

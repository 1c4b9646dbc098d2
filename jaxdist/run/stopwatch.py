"""Where the time of a run goes: the accounts of a stopwatch, and the durations of the steps."""

import bisect
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping

ACCOUNTS = ("input", "compute", "checkpoint", "eval", "compile", "restart", "other")
"""The keys of the run record's `time_seconds`."""


class Stopwatch:
    """Where the wall time goes: every moment since the start belongs to exactly one account.

    Accounts nest: `with watch.account("compile")` inside `with watch.account("compute")` takes its time from the outer
    one, and time outside all accounts is `other`; so the accounts always add up to the wall time. For one thread.

    `carried` are the time_seconds of the run that this one resumes, which are counted on.
    """

    def __init__(
        self, carried: Mapping[str, float] | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = dict.fromkeys(ACCOUNTS, 0.0)
        for name, seconds in (carried or {}).items():
            self.add(name, seconds)
        self._clock = clock
        self._open = ["other"]
        self._since = clock()
        self._accounts = {name: _Account(self, name) for name in ACCOUNTS}

    def account(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Charge the time inside the `with` to `name`, one of ACCOUNTS."""
        _check_account(name)
        return self._accounts[name]

    def enter(self, name: str) -> None:
        """Charge the time from now on to `name`, until `leave`."""
        self._settle()
        self._open.append(name)

    def leave(self) -> None:
        """Charge the time from now on to what it was charged to before the last `enter`."""
        self._settle()
        self._open.pop()

    @property
    def phase(self) -> str:
        """The account that time is charged to now; may be read from another thread."""
        return self._open[-1]

    def add(self, name: str, seconds: float) -> None:
        """Charge time that passed before the stopwatch started, for example from a failure to this restart."""
        _check_account(name)
        self._seconds[name] += seconds

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each account until now."""
        self._settle()
        return dict(self._seconds)

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


class _Account(contextlib.AbstractContextManager[None]):
    """An account in a `with`. It keeps nothing itself, so that one serves every step: a generator takes four times as
    long, which a small step shows.
    """

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self._watch, self._name = watch, name

    def __enter__(self) -> None:
        self._watch.enter(self._name)

    def __exit__(self, *_: object) -> None:
        self._watch.leave()


def _check_account(name: str) -> None:
    if name not in ACCOUNTS:
        raise ValueError(f"Time is charged to one of {', '.join(ACCOUNTS)}; got {name!r}.")


class StepTimes:
    """Quantiles of step durations in bounded memory: a histogram with bins 1% apart, from 1 microsecond to a day.

    A quantile is therefore right to 0.5%, whatever the number of steps and in whatever order they came; a duration
    outside the range counts as its nearest end. The idea is DDSketch's (Masson, Rim and Lee, 2019).
    """

    _EDGES = tuple(1e-6 * 1.01**index for index in range(2534))

    def __init__(self) -> None:
        self._counts = [0] * (len(self._EDGES) + 1)
        self._total = 0

    def add(self, seconds: float) -> None:
        """Count one step of this duration."""
        self._counts[bisect.bisect_left(self._EDGES, seconds)] += 1
        self._total += 1

    def quantile(self, fraction: float) -> float | None:
        """Return the seconds that this fraction of the steps did not exceed; None before the first step."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"A quantile's fraction must be in [0, 1]; got {fraction}.")
        if not self._total:
            return None
        wanted = max(1, math.ceil(fraction * self._total))
        index = bisect.bisect_left(list(itertools.accumulate(self._counts)), wanted)
        return self._EDGES[min(index, len(self._EDGES) - 1)] / math.sqrt(1.01)  # the middle of the bin

    def summary(self) -> dict[str, float | None]:
        """Return the run record's `step_seconds`: p50 and p95."""
        return {"p50": self.quantile(0.5), "p95": self.quantile(0.95)}

"""The simulated time: what happens when, and the one generator of random numbers."""

import heapq
import random
from collections.abc import Callable


class SeededTime:
    """A queue of actions by time. Actions of one time happen in the order in which they were added."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._added = 0

    def at(self, delay: float, action: Callable[[], None]) -> None:
        """Do `action` after `delay` seconds."""
        self._added += 1
        heapq.heappush(self._queue, (self.now + max(delay, 0.0), self._added, action))

    def often(self, rate: float, until: float, action: Callable[[], None]) -> None:
        """Do `action` at random times, `rate` times a second, until then."""
        time = self.now
        while rate and (time := time + self.rng.expovariate(rate)) < until:
            self.at(time - self.now, action)

    def step(self) -> bool:
        """Do the next action; return False if there is none."""
        if not self._queue:
            return False
        self.now, _, action = heapq.heappop(self._queue)
        action()
        return True

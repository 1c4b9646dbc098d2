"""Mixtures: several sources drawn in proportions, which may change during training.

The order stays a pure function of (seed, epoch, position): how often each source was drawn before a stage of the
schedule follows from the stages before it.
"""

import bisect
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdist.data import order
from jaxdist.data.sources.combine import Concatenated
from jaxdist.data.sources.source import Source


def mix(
    sources: Sequence[Source], weights: Sequence[int], *, later: Mapping[int, Sequence[int]] | None = None
) -> "tuple[Concatenated, order.Mixed | ScheduledMix]":
    """Return the source and the order that draw from `sources` in the proportion of the whole numbers `weights`.

    >>> source, shuffle = mix([web, books], (3, 1), later={100_000: (1, 1)})
    >>> loader = Loader(source, shuffle=shuffle, global_batch_size=64, seed=0)

    Args:
      sources: none of them empty.
      weights: one a source, at least 0 and not all 0; a source of weight 0 is left out.
      later: weights from an example on, counted from the beginning of the training over all epochs; see `ramp`.
    """
    sizes = tuple(len(source) for source in sources)
    if later is None:
        return Concatenated(sources), order.Mixed(sizes, tuple(weights))
    broken = [first for first in later if first != int(first)]
    if broken:
        raise ValueError(f"Stages begin at whole numbers of examples; got {broken}.")
    stages = {0: tuple(weights), **{int(first): tuple(each) for first, each in later.items()}}
    return Concatenated(sources), ScheduledMix(sizes, tuple(sorted(stages.items())))


def ramp(
    begin: tuple[int, Sequence[float]], end: tuple[int, Sequence[float]], *, num_stages: int = 10
) -> dict[int, tuple[int, ...]]:
    """Return weights that go in equal steps from those of `begin` to those of `end`, each (example, weights).

    >>> mix([easy, hard], (1, 0), later=ramp((0, (1, 0)), (50_000, (0.5, 0.5))))

    Shares are rounded to thousandths.
    """
    (first, low), (last, high) = begin, end
    are_shares = all(min(each, default=-1) >= 0 and 0 < sum(each) < math.inf for each in (low, high))
    if not (0 <= first < last and 1 <= num_stages <= last - first and len(low) == len(high) and are_shares):
        raise ValueError(
            f"A ramp goes from one example to a later one, with at most as many stages as examples between them, and "
            f"weights of at least 0, not all 0, one a source, at both ends; got {begin}, {end} and {num_stages} stages."
        )
    shares = [np.asarray(each, np.float64) / sum(each) for each in (low, high)]
    found = {}
    for stage in range(1, num_stages + 1):
        part = stage / num_stages
        rounded = np.rint(1000 * ((1 - part) * shares[0] + part * shares[1])).astype(int).tolist()
        divisor = math.gcd(*rounded)
        found[first + round((last - first) * part)] = tuple(each // divisor for each in rounded)
    return found


@dataclasses.dataclass(frozen=True)
class ScheduledMix(order.Contiguous):
    """Several sources, with consecutive ids, drawn in proportions that change: see `mix`.

    `stages` are pairs (example, weights), ascending, the first at 0; examples are counted over all epochs. Within a
    stage the draws are those of `order.Mixed`; a weight of 0 leaves a source out. Each source is read pass after pass,
    every pass with each of its examples once, across stages and epochs.
    """

    sizes: tuple[int, ...]
    stages: tuple[tuple[int, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", order.whole_sizes(self.sizes))
        begins = [begin for begin, _ in self.stages]
        if not begins or begins[0] != 0 or any(one >= other for one, other in itertools.pairwise(begins)):
            raise ValueError(f"Stages ascend from example 0; got those at {begins}.")
        stages = tuple((int(begin), order.whole_weights(each, len(self.sizes))) for begin, each in self.stages)
        object.__setattr__(self, "stages", stages)

    @property
    def version(self) -> str:
        """See Order."""
        plain = [(begin, *weights) for begin, weights in self.stages]
        return f"scheduled-{order.ORDER_VERSION}:{hashlib.sha256(str(plain).encode()).hexdigest()[:12]}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        order.check_range(num_examples, epoch, start, stop)
        if num_examples != sum(self.sizes):
            raise ValueError(f"These sources have {sum(self.sizes)} examples in all; got num_examples={num_examples}.")
        start, stop = start + epoch * num_examples, stop + epoch * num_examples
        begins = [begin for begin, _ in self.stages]
        parts = [np.empty(0, np.int64)]
        while start < stop:
            stage = bisect.bisect_right(begins, start) - 1
            end = min(stop, begins[stage + 1]) if stage + 1 < len(begins) else stop
            positions = np.arange(start, end, dtype=np.int64) - begins[stage]
            weights = self.stages[stage][1]
            parts.append(order.drawn_in_turn(self.sizes, weights, positions, self._drawn_before(stage), seed))
            start = end
        return np.concatenate(parts)

    def _drawn_before(self, stage: int) -> tuple[int, ...]:
        """Return how many examples of each source the stages before `stage` have drawn."""
        drawn = [0] * len(self.sizes)
        for (begin, weights), (end, _) in itertools.pairwise(self.stages[: stage + 1]):
            cycles, rest = divmod(end - begin, sum(weights))
            turns = order.spread(weights)[:rest]
            drawn = [count + cycles * weight + turns.count(i) for i, (count, weight) in enumerate(zip(drawn, weights))]
        return tuple(drawn)

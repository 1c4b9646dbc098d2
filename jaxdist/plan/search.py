"""Which way of training an experiment fits a topology, and which of those that fit should be fastest.

Every candidate is compiled; nothing is estimated from formulas. A refused candidate keeps the reason.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from jaxdist.config.experiment import Experiment
from jaxdist.errors import UserError
from jaxdist.plan.estimate import Estimate, estimate
from jaxdist.plan.topology import Topology

STRATEGIES = ("data-parallel", "zero1", "fsdp")
MICROBATCHES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train: what is changed in the experiment, and the result.

    Attributes:
      assignments: for `--set`.
      estimate: None where it was refused.
      refused: why, empty where it was not.
    """

    assignments: tuple[str, ...]
    estimate: Estimate | None
    refused: str = ""

    @property
    def works(self) -> bool:
        """Whether it compiles and fits (a topology without a memory of its own always fits)."""
        return self.estimate is not None and self.estimate.fits is not False


def changes(experiment: Experiment) -> Iterator[tuple[tuple[str, ...], Experiment]]:
    """Yield each candidate's assignments and the experiment with them."""
    for strategy in STRATEGIES:
        for count in MICROBATCHES:
            changed = dataclasses.replace(experiment, strategy=strategy, num_microbatches=count)
            yield (f"strategy={strategy}", f"num_microbatches={count}"), changed


def search(experiment: Experiment, topology: Topology, *, show: Callable[[str], None]) -> list[Candidate]:
    """Return all candidates, those that work first and fastest first; more microbatches only until one fits.

    Args:
      experiment: what to train; its strategy and microbatches are replaced.
      topology: where.
      show: told what is being compiled.
    """
    found: list[Candidate] = []
    fitting: set[str] = set()
    for assignments, changed in changes(experiment):
        if assignments[0] in fitting:
            continue  # more microbatches save memory but cost time, and this strategy already fits
        show(" ".join(assignments))
        candidate = _try(assignments, changed, topology)
        found.append(candidate)
        if candidate.works:
            fitting.add(assignments[0])
    return rank(found)


def rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates in order: working ones by step time then bytes, then those too large, then the refused."""

    def place(candidate: Candidate) -> tuple[int, float, int]:
        made = candidate.estimate
        if made is None:
            return 2, 0.0, 0
        return (0, made.step_seconds, made.bytes.total) if candidate.works else (1, float(made.bytes.total), 0)

    return sorted(candidates, key=place)


def _try(assignments: tuple[str, ...], experiment: Experiment, topology: Topology) -> Candidate:
    try:
        return Candidate(assignments, estimate(experiment, topology))
    except UserError as error:
        return Candidate(assignments, None, str(error))

"""Which way of training an experiment fits a topology, and which of those that fit should be fastest.

Every candidate is compiled; nothing is estimated from formulas. A refused candidate keeps the reason. Of one way to
spread the model, what saves memory and costs time (remat, more microbatches) is tried only until it fits.
"""

import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from jaxdist.config.experiment import Experiment
from jaxdist.config.overrides import override
from jaxdist.errors import UserError
from jaxdist.plan.compiled.facts import TooLargeError
from jaxdist.plan.estimate import Estimate, estimate
from jaxdist.plan.topology import Topology

STRATEGIES = ("data-parallel", "zero1", "fsdp")
MICROBATCHES = (1, 2, 4, 8)
MODEL_AXES = (2, 4, 8)
HOST_DEVICES = 8
"""Devices over which `hsdp` shards a state, where a host has no other number."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train: what is changed in the experiment, and the result.

    Attributes:
      assignments: for `--set`.
      estimate: None where it was refused.
      refused: why, empty where it was not.
      is_too_large: whether it needs more memory than a device has.
    """

    assignments: tuple[str, ...]
    estimate: Estimate | None
    refused: str = ""
    is_too_large: bool = False

    @property
    def works(self) -> bool:
        """Whether it compiles and fits (a topology without a memory of its own always fits)."""
        return self.estimate is not None and self.estimate.fits is not False


_Result: TypeAlias = tuple[Candidate, bool]
"""A candidate, and whether it is the last one of its way to spread the model."""


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
      candidates: in order: working ones, fastest first, then those too large, then the refused.
      interrupted: whether it was stopped before all were tried.
    """

    candidates: Sequence[Candidate]
    interrupted: bool = False


def ways(num_devices: int, host_devices: int | None, *, has_mesh: bool = False) -> list[tuple[str, ...]]:
    """Return the assignments of each way to spread a model over so many devices; `has_mesh`: as it is, it has one."""
    default_mesh = ("mesh=None",) if has_mesh else ()
    found: list[tuple[str, ...]] = [(f"strategy={name}", *default_mesh) for name in STRATEGIES]
    on_host = host_devices or HOST_DEVICES
    if num_devices % on_host == 0 and num_devices > on_host:
        found.append(("strategy=hsdp", f"mesh={{'data': {num_devices // on_host}, 'fsdp': {on_host}}}"))
    tensor = [size for size in MODEL_AXES if num_devices % size == 0]
    return found + [("strategy=tensor", f"mesh={{'data': {num_devices // size}, 'model': {size}}}") for size in tensor]


def savings(experiment: Experiment) -> list[tuple[str, ...]]:
    """Return what saves memory, the cheapest first: remat where the model has it, then more microbatches."""
    remat = [()] if getattr(experiment.model, "remat", None) is not False else [(), ("model.remat=True",)]
    return [(f"num_microbatches={count}", *more) for count in MICROBATCHES for more in remat]


def search(experiment: Experiment, topology: Topology, *, show: Callable[[int, int, str], None]) -> SearchResult:
    """Compile the ways to train `experiment`, several at a time, and return them ranked.

    Ctrl-C ends it with what was found until then; a compilation that is running is not waited for.

    Strategy, mesh, microbatches and remat of the experiment are replaced. `show` is told how many ways are done, how
    many there are, and what was compiled last.
    """
    results: queue.Queue[_Result] = queue.Queue()
    stop = threading.Event()
    todo = ways(len(topology.devices), topology.chip.host_devices, has_mesh=experiment.mesh is not None)

    def climb(way: tuple[str, ...]) -> None:
        for saving in savings(experiment):
            if stop.is_set():
                return
            candidate = _try((*way, *saving), experiment, topology)
            # What saves more memory than is needed would only cost more time.
            is_last = candidate.works or not candidate.is_too_large or saving == savings(experiment)[-1]
            results.put((candidate, is_last))
            if is_last:
                return

    waiting: queue.SimpleQueue[tuple[str, ...]] = queue.SimpleQueue()
    for way in todo:
        waiting.put(way)
    errors: list[BaseException] = []
    for _ in range(min(os.cpu_count() or 1, len(todo))):
        # Daemons, since a compilation cannot be interrupted: they end with the process.
        threading.Thread(target=_work, args=(waiting, climb, stop, results, errors), daemon=True).start()
    return _collect(results, len(todo), stop, errors, show)


def _work(
    waiting: "queue.SimpleQueue[tuple[str, ...]]",
    climb: Callable[[tuple[str, ...]], None],
    stop: threading.Event,
    results: "queue.Queue[_Result]",
    errors: list[BaseException],
) -> None:
    try:
        while not stop.is_set():
            climb(waiting.get_nowait())
    except queue.Empty:
        pass
    except BaseException as error:  # re-raised where the results are collected
        errors.append(error)
        results.put((Candidate((), None), True))


def _collect(
    results: "queue.Queue[_Result]",
    total: int,
    stop: threading.Event,
    errors: list[BaseException],
    show: Callable[[int, int, str], None],
) -> SearchResult:
    found: list[Candidate] = []
    done = 0
    try:
        while done < total:
            candidate, is_last = results.get()
            if errors:
                raise errors[0]
            found.append(candidate)
            done += is_last
            show(done, total, " ".join(candidate.assignments))
    except KeyboardInterrupt:
        return SearchResult(rank(found), interrupted=True)
    finally:
        stop.set()
    return SearchResult(rank(found))


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
        made = estimate(override(experiment, assignments), topology)
        return Candidate(assignments, made, is_too_large=made.fits is False)
    except TooLargeError as error:
        return Candidate(assignments, None, str(error), is_too_large=True)
    except UserError as error:
        return Candidate(assignments, None, str(error))

"""The hook that records the hashes of a run's steps, and says when a step that is made again has other bits."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxdist import errors
from jaxdist.guards import step_hashes
from jaxdist.run import components
from jaxdist.run.loop import LOOK_EVERY, StepInfo
from jaxdist.run.replay import comparison, step_chain
from jaxdist.rundir import record
from jaxdist.spmd.step import STEP_HASHES

_MOST_WAITING, _MOST_SECONDS = 64, 1.0
"""Reading and writing the hashes of one step takes a tenth of a small step; those of many at once, hardly more."""
_MOST_RECORDED = 100
_MOST_TOLD = 3


class ChainRecorder:
    """A hook that reads the hashes of steps some steps late, when they are computed, and writes them to the chain.

    There is a recorder on process 0 alone; the others only keep step. `earlier` is what the run record of an earlier
    attempt says of the chain.
    """

    def __init__(
        self,
        recorder: step_chain.ChainFile | None,
        earlier: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._recorder, self._clock, self._written = recorder, clock, clock()
        self._pending: list[tuple[int, jax.Array]] = []
        self._unequal: list[dict[str, Any]] = list((earlier or {}).get("unequal", []))
        self._told = 0

    def __call__(self, info: StepInfo) -> None:
        """Keep the hashes of a step; write those of earlier ones."""
        if self._recorder is None:
            return
        self._pending.append((info.step, info.metrics[STEP_HASHES]))
        waiting = len(self._pending) - LOOK_EVERY
        if waiting >= _MOST_WAITING or (waiting >= LOOK_EVERY and self._clock() - self._written >= _MOST_SECONDS):
            self.flush(leave=LOOK_EVERY)

    def flush(self, *, leave: int = 0) -> None:
        """Write all but the newest `leave` hashes that wait; waits for these steps."""
        end = len(self._pending) - leave
        ready, self._pending = self._pending[:end], self._pending[end:]
        self._written = self._clock()
        if not ready or self._recorder is None:
            return
        hashes = np.stack([np.asarray(each.addressable_data(0)) for _, each in ready])
        for found in self._recorder.add(ready[0][0], hashes):
            self._unequal = [*self._unequal, dataclasses.asdict(found)][:_MOST_RECORDED]
            if self._told < _MOST_TOLD:
                _tell(found)
            self._told += 1

    def finish(self, step: int) -> None:
        """Write what waits, and forget steps after `step`, the run's last: they were dispatched and did not count."""
        self.flush()
        if self._recorder is not None:
            self._recorder.cut(step)

    def summary(self) -> dict[str, Any]:
        """Return what the run record says of the chain."""
        return {"file": step_chain.FILE_NAME, "unequal": self._unequal}


def _tell(found: step_chain.Difference) -> None:
    errors.say(
        f"A step that is made again must have the same bits in canonical mode; this one had others: {found}. "
        "A device, its memory or its compiler computed wrongly before or now, or the run continues on another kind of "
        "machine. `jaxdist replay` computes a step once more."
    )


def _tell_changes(changed: list[str], step: int) -> None:
    if changed:
        errors.say(
            f"The bits of a canonical run belong to versions, threads and settings of JAX; these have changed: "
            f"{comparison.shown(changed)}. From step {step + 1} on the run has other bits than it would have had."
        )


def _tell_settings(changed: list[str], step: int) -> None:
    if changed:
        errors.say(
            f"Settings of JAX that change numbers are others than in the steps so far: {comparison.shown(changed)}. "
            f"They hold from step {step + 1} on; unset them to continue as before."
        )


def recorder_of(
    parts: components.Parts, run_dir: pathlib.Path, *, step: int, earlier: record.RunRecord | None
) -> contextlib.AbstractContextManager[ChainRecorder | None]:
    """Return the context of the hook that records a canonical run from `step` on; of None where none is recorded.

    `earlier` is the record of the attempt before.
    """
    shards = parts.strategy.logical_shards
    if shards is None and earlier is not None and jax.process_index() == 0:
        _tell_settings(comparison.changed_jax_settings(earlier), step)
    if shards is None or not parts.experiment.guards.step_hashes:
        return contextlib.nullcontext()
    form = step_chain.Form(shards, tuple(step_hashes.names(parts.abstract_state)))
    compares = earlier is not None and comparison.same_bits_expected(parts.experiment, earlier)
    if earlier is not None and jax.process_index() == 0:
        _tell_changes(comparison.changed_versions(earlier), step)
    before = earlier.extra.get("chain") if earlier else None
    return recorded(run_dir, form, step=step, compares=compares, earlier=before)


@contextlib.contextmanager
def recorded(
    run_dir: pathlib.Path, form: step_chain.Form, *, step: int, compares: bool, earlier: Mapping[str, Any] | None
) -> Iterator[ChainRecorder]:
    """Yield the hook that records the steps after `step`; close its file.

    `earlier` is what the run record of an earlier attempt says of the chain; for `compares` see `step_chain.ChainFile`.
    """
    if jax.process_index() != 0:
        yield ChainRecorder(None, earlier)
        return
    with contextlib.closing(step_chain.ChainFile(run_dir, form, step=step, compares=compares)) as file:
        yield ChainRecorder(file, earlier)

"""How a run survives failures: snapshots, the ledger, the watchdog, and the state that a restart continues from.

The supervisor (`launch.supervising.supervisor`) starts the processes and keeps the memory; this is the part in them.
"""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxdist import errors
from jaxdist.checkpoint import checkpoints, pieces
from jaxdist.checkpoint import snapshots as snapshot
from jaxdist.config.experiment import Recovery
from jaxdist.launch.joining import places, same_on_all
from jaxdist.launch.supervising import hosts, joined, restart_events, supervisor, watchdog
from jaxdist.launch.supervising.several_hosts import neighbours
from jaxdist.launch.supervising.standby import reserve
from jaxdist.run import components
from jaxdist.run.hooks import every
from jaxdist.run.loop import Hook, StepInfo
from jaxdist.rundir import files, ledger
from jaxdist.spmd import keys
from jaxdist.spmd.step import NONFINITE_LEAF

SNAPSHOT_SHARE = 0.01
"""Share of the time that snapshots may take where the run decides how often. Their indirect cost, caches and the
devices' order, is about the same: two percent in all."""
_MODULES_AFTER = 3
"""Steps of the first attempt after which it has imported what it needs."""
MOST_STEPS = 1000
"""Between two snapshots, for steps of any length."""


def memory(environment: Mapping[str, str] = os.environ) -> pathlib.Path | None:
    """Return the directory in memory that the supervisor keeps, None without one."""
    return pathlib.Path(environment[supervisor.MEMORY]) if supervisor.MEMORY in environment else None


def seconds_since_failure(environment: Mapping[str, str] = os.environ) -> float:
    """Return how long ago the attempt before this one failed, 0 for the first."""
    failed_at = environment.get(supervisor.FAILED_AT)
    return 0.0 if failed_at is None else max(0.0, time.monotonic() - float(failed_at))


def deadline(settings: Recovery, environment: Mapping[str, str] = os.environ) -> Callable[[], bool]:
    """Return the function that says whether the job's time is over.

    The supervisor knows the start of the job; in a process without a supervisor, the job starts now.
    """
    given = math.inf if settings.deadline_seconds is None else time.monotonic() + settings.deadline_seconds
    end = float(environment.get(supervisor.DEADLINE, given))
    return lambda: time.monotonic() >= end


def change_due(environment: Mapping[str, str] = os.environ) -> Callable[[], bool]:
    """Return the function that says whether the job should end at this step, so that other processes can take part."""
    directory = memory(environment)
    if directory is None:
        return lambda: False
    name = str(directory / restart_events.CHANGE_NAME)
    return lambda: os.path.exists(name)


def note_end_for_change() -> None:
    """Tell the supervisor that the processes have ended their last step before a change of their number."""
    directory = memory()
    if directory is not None and jax.process_index() == 0:
        with contextlib.suppress(OSError):  # it counts the lost seconds from the end of the processes then
            (directory / restart_events.CHANGE_NAME).write_text(str(time.monotonic()))


def tell_recovery(run_dir: pathlib.Path, environment: Mapping[str, str] = os.environ) -> Hook | None:
    """Return the hook that notes, on process 0, when the job makes new steps again; None if it made none before."""
    if restart_events.LOST_SINCE not in environment or jax.process_index() != 0:
        return None
    since, reached = float(environment[restart_events.LOST_SINCE]), int(environment[restart_events.REACHED])

    def tell(info: StepInfo) -> None:
        seconds = round(time.monotonic() - since, 3)
        restart_events.Events(run_dir).note("recovered", step=info.step, seconds=seconds)
        errors.say(f"Step {info.step} is made by {jax.process_count()} processes; {seconds:.1f} s were lost.")

    return once(lambda info: info.step > reached, tell)


def has_made_steps(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether an earlier attempt of this job made steps, so that its experiment has passed the checks."""
    return int(environment.get(restart_events.REACHED, 0)) > 0


def tell_modules() -> Hook | None:
    """Return the hook that names the modules which process 0 has imported, once; None if that is not needed.

    The next processes get them imported.
    """
    directory = memory()
    if directory is None or jax.process_index() != 0 or (directory / joined.MODULES_NAME).exists():
        return None
    names = directory / joined.MODULES_NAME
    return _once_imported(lambda: files.write_unsynced(names, ["\n".join(sys.modules).encode()]))


def _once_imported(tell: Callable[[], object]) -> Hook:
    """Return the hook that calls `tell` once, when the attempt has imported what it needs."""
    calls = itertools.count(1)
    return once(lambda info: next(calls) == _MODULES_AFTER, lambda info: tell())


def once(is_time: Callable[[StepInfo], bool], tell: Callable[[StepInfo], object]) -> Hook:
    """Return the hook that calls `tell` after the first step for which `is_time`; a full disk is no matter."""
    told = False

    def hook(info: StepInfo) -> None:
        nonlocal told
        if not told and is_time(info):
            told = True
            with contextlib.suppress(OSError):
                tell(info)

    return hook


def ask_for_reserve(settings: Recovery, mesh: jax.sharding.Mesh) -> Hook | None:
    """Return the hook that has the supervisor keep processes ready, on process 0; None if it should not.

    It asks when the attempt has made some steps; after a failure at the first new one, since failures come in groups.
    """
    directory, on_cpu = memory(), mesh.devices.flat[0].platform == "cpu"
    wanted = on_cpu if settings.standby is None else settings.standby
    if directory is None or jax.process_index() != 0 or not wanted:
        return None
    ask, reached = (directory / reserve.WANTED_NAME).touch, int(os.environ.get(restart_events.REACHED, 0))
    return once(lambda info: info.step > reached, lambda info: ask()) if reached else _once_imported(ask)


def rehearse(parts: components.Parts, is_wanted: Callable[[], bool] = lambda: False) -> None:
    """Make two steps from a state of zeros and drop them, so that all that a run needs is compiled and loaded.

    The second is a step from the result of the first, as all others are. A job that is killed while it evaluates has to
    evaluate again before its next step. Once process 0 finds that the job waits for these processes (`is_wanted`), the
    rest is left out: the run compiles and loads it when it needs it.
    """
    for number, stage in enumerate(_rehearsal(parts)):
        if same_on_all.from_first(f"rehearsal {number}", "over" if is_wanted() else ""):
            return
        stage()


def _rehearsal(parts: components.Parts) -> Iterator[Callable[[], object]]:
    """Yield what is rehearsed, in turn."""
    state = jax.tree.map(_zeros, parts.abstract_state)

    def step() -> None:
        nonlocal state
        with contextlib.closing(parts.batches()) as batches:  # type: ignore[type-var]
            batch, _ = next(batches)
        state, metrics = parts.step(state, batch)
        jax.block_until_ready((state, metrics))

    yield from (step, lambda: snapshot.copy(state), step, lambda: parts.evaluate_one_batch(state))
    if parts.learning_rate is not None:
        yield functools.partial(parts.learning_rate, 1)


def _zeros(struct: jax.ShapeDtypeStruct) -> jax.Array:
    plain = jax.eval_shape(jax.random.key_data, struct) if keys.is_key(struct) else struct
    return pieces.place(np.zeros(plain.shape, plain.dtype), struct)


def open_snapshots(settings: Recovery, identity: str) -> snapshot.Snapshots | None:
    """Return the snapshots of this process, None if the run takes none."""
    directory = memory()
    if directory is None or settings.snapshot_every == 0:
        return None
    return snapshot.Snapshots(directory, identity=identity, **_on_several_hosts(os.environ))


def _on_several_hosts(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what the snapshots of a process do for the hosts of its job, if there are several."""
    if places.MEETING not in environment:
        return {}
    first, count = int(environment[places.FIRST]), int(environment[places.NUM_PROCESSES])
    found: dict[str, Any] = {"here": range(first, first + count)}
    if hosts.NEIGHBOUR in environment:
        key = neighbours.secret(pathlib.Path(environment[hosts.FOLDER]))
        found["copy"] = neighbours.Copier(environment[hosts.NEIGHBOUR], key)
    return found


def _newest_in_memory(snapshots: snapshot.Snapshots, environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the newest step that all processes have in memory; those of one host read the same directory."""
    if places.MEETING not in environment:
        return snapshots.latest_step()
    return same_on_all.largest_common("steps in memory", snapshots.whole_steps())


def restore_newest(
    template: Any, checkpointer: checkpoints.Checkpointer, snapshots: snapshot.Snapshots | None
) -> tuple[Any, dict[str, Any]] | None:
    """Return the newest saved state and its data_state: from memory, else from disk; None if nothing is saved."""
    saved = checkpointer.latest_step()
    in_memory = _newest_in_memory(snapshots) if snapshots else None
    if snapshots and in_memory is not None and (saved is None or in_memory >= saved):
        return snapshots.restore(template, in_memory)
    return None if saved is None else checkpointer.restore(template)


def saved_step(directory: pathlib.Path, checkpointer: checkpoints.Checkpointer, identity: str) -> int:
    """Return the newest step that is left in memory or on disk, 0 for none; for the supervisor, starts no JAX."""
    in_memory = snapshot.Snapshots(directory, identity=identity, process=0).latest_step()
    return max(in_memory or 0, checkpointer.latest_step() or 0)


def snapshot_hook(snapshots: snapshot.Snapshots, before: Callable[[], None]) -> Hook:
    """Return the hook that takes a snapshot after each step it is called with.

    `before` writes what a run that continues from the snapshot will not write again.
    """

    def take(info: StepInfo) -> None:
        before()
        data_state = {"position": info.position.to_json(), "progress": info.progress.to_json()}
        snapshots.save(info.step, info.state, data_state, nonfinite=info.metrics[NONFINITE_LEAF])

    return take


def snapshots_when_due(
    snapshots: snapshot.Snapshots,
    settings: Recovery,
    step_seconds: Callable[[], float | None],
    agreed: Callable[[float], float],
    before: Callable[[], None],
) -> Hook:
    """Return the hook that takes snapshots as often as `settings` ask for; see `snapshot_hook` and `Paced`."""
    take = snapshot_hook(snapshots, before)
    if settings.snapshot_every is not None:
        return every(settings.snapshot_every, take)
    return Paced(take, cost_seconds=lambda: snapshots.cost_seconds, step_seconds=step_seconds, agreed=agreed)


class Paced:
    """A hook that calls another at intervals that keep its share of the time fixed, at the same steps on every process.

    The first step is always included, so a run that makes any progress keeps it. The duration of a call and of a step
    are measured during the run; the idea is CheckFreq's (Mohan et al., FAST 2021).

    The duration of a call is `cost_seconds`, as far as it is known, that of a step `step_seconds`, None while it is
    not. `agreed` combines the processes' measurements into one number; see `agreement.Agreement.number`.
    """

    def __init__(
        self,
        take: Hook,
        *,
        cost_seconds: Callable[[], float],
        step_seconds: Callable[[], float | None],
        agreed: Callable[[float], float],
        share: float = SNAPSHOT_SHARE,
    ):
        self._take, self._cost_seconds, self._step_seconds = take, cost_seconds, step_seconds
        self._agreed, self._share, self._next = agreed, share, 0

    def __call__(self, info: StepInfo) -> None:
        """Call the other hook if its turn has come."""
        if info.step >= self._next:
            self._take(info)
            self._next = info.step + int(self._agreed(self._interval()))

    def _interval(self) -> float:
        step_seconds = self._step_seconds()
        if step_seconds is None:
            return 1.0
        steps = math.ceil(self._cost_seconds() / (self._share * step_seconds))
        return float(min(max(1, steps), MOST_STEPS))


@contextlib.contextmanager
def recorded(settings: Recovery, run_dir: pathlib.Path, *, step: int, place: Any) -> Iterator[list[Hook]]:
    """Yield the hook that writes the ledger, if the settings ask for one and on process 0; close the ledger."""
    if not settings.ledger or jax.process_index() != 0:
        yield []
        return
    with contextlib.closing(ledger.Recorder(run_dir, step=step, place=place)) as recorder:
        yield [lambda info: recorder.add(info.step, info.position)]


def watched(
    settings: Recovery,
    run_dir: pathlib.Path,
    where: Callable[[], tuple[int, str]],
    on_hang: Callable[[watchdog.HangVerdict], object],
) -> watchdog.Watchdog:
    """Return the watchdog of this process, to be used as a context around training."""
    directory = memory() or run_dir / supervisor.BOARD_NAME
    process = jax.process_index()
    return watchdog.Watchdog(
        directory,
        process=process,
        num_processes=jax.process_count(),
        where=where,
        limits=watchdog.Limits(hang_seconds=settings.hang_seconds, slow_seconds=settings.slow_seconds),
        on_hang=on_hang,
    )

"""A full disk costs checkpoints, not the run: a save that does not fit is left out, with one warning.

The free space is compared with the size of the state before anything is copied; process 0 checks, and all use its
answer. A quota shows only when the files are written: what fails on one process then fails on all of them. At the end
of a run the state that does not fit stays in memory, where the next start of the run finds it.
"""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxdist import errors
from jaxdist.checkpoint import checkpoints, snapshots
from jaxdist.launch.supervising import job_memory
from jaxdist.run.loop import Hook, StepInfo
from jaxdist.rundir import full_disk

_LOOK_SECONDS = 1.0
"""Seconds between two checks of the disk: a step may be far shorter than a check."""


def unless_full(
    save: Hook,
    directory: pathlib.Path,
    *,
    agreed: Callable[[float], float],
    clock: Callable[[], float] = time.monotonic,
) -> Hook:
    """Return the hook `save`, called only while `directory` has room for a checkpoint of the state.

    `agreed` makes one number of what the processes see; see `agreement.Agreement.number`.
    """
    told, looked_at, fits = False, -float("inf"), True

    def save_if_it_fits(info: StepInfo) -> None:
        nonlocal told, looked_at, fits
        now = clock()
        looks = now - looked_at >= _LOOK_SECONDS
        if looks:
            looked_at, fits = now, has_room(info.state, directory)
        saved = bool(agreed(float(fits))) and _saves(save, info)
        if not saved and not told and jax.process_index() == 0:
            full_disk.say(
                f"The disk of {directory} has no room for a checkpoint. The run continues, and saves again when there "
                "is room."
            )
        told = not saved or (told and not looks)

    return save_if_it_fits


def _saves(save: Hook, info: StepInfo) -> bool:
    """Return whether a save, or the one before it, did not fail for a full disk: a quota shows only there."""
    try:
        save(info)
    except checkpoints.CheckpointError as error:
        if not is_no_room(error):
            raise
        return False
    return True


def is_no_room(error: checkpoints.CheckpointError) -> bool:
    """Return whether a save failed because the disk is full. Every process gets the error, so all can continue."""
    return isinstance(error, checkpoints.NoRoomError) or full_disk.is_full(error)


def keep_in_memory(
    directory: pathlib.Path,
    ours: snapshots.Snapshots | None,
    identity: str,
    step: int,
    state: Any,
    data: Mapping[str, Any],
) -> str:
    """Keep the last state of a run whose disk is full in memory; return where it is, "" if nowhere.

    All processes call this. `ours` are the snapshots of a supervised job, whose directory is the supervisor's; None
    without a supervisor. `identity` and `data` are as for a checkpoint.
    """
    with contextlib.ExitStack() as stack:
        if ours is None:
            if jax.process_count() > 1:
                return ""
            try:
                memory = stack.enter_context(job_memory.memory_directory(directory))
            except OSError:
                return ""
            ours = stack.enter_context(contextlib.closing(snapshots.Snapshots(memory, identity=identity)))
        ours.save(step, state, data)
        ours.wait()
        return str(ours.directory) if ours.latest_step() == step else ""


def no_room(run_dir: pathlib.Path, step: int, kept: str) -> errors.RunFailedError:
    """Return the error of a run whose last state did not fit; `kept` is where that is in memory, "" if nowhere."""
    where = (
        f"Its state stays in {kept}; free space and continue with --resume on this machine"
        if kept
        else "Free space and continue with --resume from the newest checkpoint"
    )
    return errors.RunFailedError(f"The disk of {run_dir} has no room for the checkpoint of step {step}. {where}.")


def where_kept(step: int, kept: str) -> str:
    """Return what the user is told of a state that could not be saved and is in memory, in `kept`."""
    return f"The state of step {step} stays in {kept}; continue with --resume on this machine."


def has_room(state: Any, directory: pathlib.Path) -> bool:
    """Return whether the disk of `directory` has room for `state`; true if its size is unknown."""
    try:
        disk = shutil.disk_usage(directory)
    except OSError:
        return True  # whatever is wrong with the directory, saving to it says so
    needed = checkpoints.needed_bytes([leaf.nbytes for leaf in jax.tree.leaves(state)])
    return disk.free >= needed or not disk.total

"""A full disk costs checkpoints, not the run: a save that does not fit is left out, with one warning.

A save that fails half-way ends the run, and on several processes leaves the others in a barrier. So the free space is
compared with the size of the state before; process 0 looks, and all agree on the answer.
"""

import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxdist.run.loop import Hook, StepInfo

_LOOK_SECONDS = 1.0
"""Between two looks at the disk: steps may be far shorter than a look."""
_BESIDES = 1 << 20
"""Bytes for manifests and metadata of a checkpoint."""


def unless_full(
    save: Hook,
    directory: pathlib.Path,
    *,
    agreed: Callable[[float], float],
    clock: Callable[[], float] = time.monotonic,
) -> Hook:
    """Return the hook `save`, called only while `directory` has room for a checkpoint of the state.

    Args:
      save: saves at the steps that are due.
      directory: on the disk that checkpoints go to.
      agreed: makes one number of what the processes see; see `agreement.Agreement.number`.
      clock: seconds.
    """
    told, looked_at, fits = False, -float("inf"), True

    def save_if_it_fits(info: StepInfo) -> None:
        nonlocal told, looked_at, fits
        now = clock()
        if now - looked_at >= _LOOK_SECONDS:
            looked_at, fits = now, has_room(info.state, directory)
        room = agreed(float(fits))
        if room:
            save(info)
        elif not told and jax.process_index() == 0:
            print(
                f"jaxdist: The disk of {directory} has no room for a checkpoint. The run continues, and saves again "
                "when there is room.",
                file=sys.stderr,
                flush=True,
            )
        told = not room

    return save_if_it_fits


def has_room(state: Any, directory: pathlib.Path) -> bool:
    """Return whether the disk of `directory` has room for `state`; true if its size is unknown."""
    try:
        disk = shutil.disk_usage(directory)
    except OSError:
        return True  # whatever is wrong with the directory, saving to it says so
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return disk.free >= needed + _BESIDES or not disk.total

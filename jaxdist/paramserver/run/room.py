"""What an observer does while the disk is full: the processes wait for room, because each step must be in their log."""

import pathlib
import time
from collections.abc import Callable

from jaxdist.errors import RunFailedError
from jaxdist.rundir import full_disk

STOP_SECONDS = 10.0
"""How long a run that is asked to stop waits for room; after that its newest checkpoint has to do."""


class RoomWatch:
    """Tells the user that the run waits for room, once for each time that the disk is full.

    `directory` is the folder that the processes write to; the run directory is for messages.
    """

    def __init__(
        self, run_dir: pathlib.Path, directory: pathlib.Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir, self._directory, self._clock = run_dir, directory, clock
        self._told = self._told_of_checkpoint = False
        self._stopping_since: float | None = None

    def look(self, *, is_stopping: bool) -> None:
        """Look whether the disk is full; called again and again.

        Args:
          is_stopping: whether the run is asked to stop, which the processes cannot do without room.

        Raises:
          RunFailedError: it was asked to stop `STOP_SECONDS` ago, and the disk has been full since.
        """
        if not full_disk.has_no_room(self._directory):
            self._told, self._stopping_since = False, None
            return
        if not self._told:
            full_disk.say(f"The disk of {self._run_dir} is full. The parameter server waits until there is room.")
        self._told = True
        if not is_stopping:
            return
        if self._stopping_since is None:
            self._stopping_since = self._clock()
        if self._clock() - self._stopping_since >= STOP_SECONDS:
            raise RunFailedError(
                f"The disk of {self._run_dir} is full, so the newest state could not be saved. Free space and continue "
                "with --resume from the newest saved step."
            )

    def note_save(self, *, fitted: bool) -> None:
        """Tell the user that a checkpoint was left out, once until one fits again."""
        if not fitted and not self._told_of_checkpoint:
            full_disk.say(
                f"The disk of {self._run_dir} has no room for a checkpoint. The run continues, and saves again when "
                "there is room."
            )
        self._told_of_checkpoint = not fitted

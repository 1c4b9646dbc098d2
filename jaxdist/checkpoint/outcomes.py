"""What the processes of a job tell each other of a save: it ends well in all of them, or all of them raise.

They use the store of the job's coordinator. A barrier would keep the others waiting when one has failed; a program on
the devices would run between training steps that differ between processes.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from jaxdist.checkpoint.manifest import CheckpointError
from jaxdist.spmd import jax_private

_KEYS = "jaxdist/checkpoint"
_TIMEOUT_SECONDS = 1200
_SAVES = itertools.count()
"""Numbers the saves of this process, so that each has keys of its own."""


class NoRoomError(CheckpointError):
    """The disk has no room for a checkpoint. Nothing was written, and every process of the job raises this."""


class Outcomes:
    """The stages of one save; every process makes its own, and they call the same methods."""

    def __init__(self) -> None:
        self._number, self._process, self._count = next(_SAVES), jax.process_index(), jax.process_count()
        self._store: Any = jax_private.coordinator_store() if self._count > 1 else None
        if self._store is not None and self._process == 0 and self._number >= 2:
            # All others have been in the save after that one, so none reads its keys any more.
            self._store.key_value_delete(f"{_KEYS}/{self._number - 2}/")

    def of_first(self, act: Callable[[], None]) -> None:
        """Have process 0 call `act`; raise on every process what that raises."""
        _raise(self._heard("begun") if self._process else self._told("begun", _problem(act)))

    def of_all(self, act: Callable[[], None], then: Callable[[], None]) -> None:
        """Call `act` and, if it ended well on every process, `then` on process 0; raise what one of these raised."""
        problem = _problem(act)
        if self._process:
            problem = self._told(str(self._process), problem) or self._heard("done")
        else:
            problems = [problem, *(self._heard(str(process)) for process in range(1, self._count))]
            problem = next((each for each in problems if each is not None), None) or _problem(then)
            self._told("done", problem)
        _raise(problem)

    def _key(self, name: str) -> str:
        return f"{_KEYS}/{self._number}/{name}"

    def _told(self, name: str, problem: Exception | None) -> Exception | None:
        if self._store is not None:
            kind = "" if problem is None else type(problem).__name__
            self._store.key_value_set(self._key(name), json.dumps([kind, str(problem)]))
        return problem

    def _heard(self, name: str) -> Exception | None:
        kind, text = json.loads(self._store.blocking_key_value_get(self._key(name), _TIMEOUT_SECONDS * 1000))
        if not kind:
            return None
        return NoRoomError(text) if kind == NoRoomError.__name__ else CheckpointError(text)


def _problem(act: Callable[[], None]) -> Exception | None:
    try:
        act()
    except Exception as error:
        return error
    return None


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem

"""Places in shards that a data set can continue from, kept in a folder so that a later start need not count to them.

A state is never trusted: the examples that follow it are hashed when it is noted, and again when it is used. It decides
how quickly a place is reached, never which examples come.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxdist.rundir import files


class KeptState(NamedTuple):
    """What a data set said of itself after `number` examples of a shard, and the hashes of those that came next."""

    number: int
    state: Any
    following: list[str]


class KeptStates:
    """The states of the shards of one data set; a file a shard, to which a line is appended at a time.

    `folder` has the files of all data sets; None takes `streams` in the cache folder of `fingerprints`. `name` is
    called once, when states are first asked for: the name of a folder of this data set's own.
    """

    def __init__(self, folder: str | os.PathLike | None, name: Callable[[], str]):
        self._given, self._name = folder, name
        self._own: pathlib.Path | None = None
        self._states: dict[int, dict[int, KeptState]] = {}

    def newest(self, shard: int, most: int) -> KeptState | None:
        """Return the state at the greatest number of examples up to `most`; None where there is none."""
        fitting = [number for number in self._of(shard) if number <= most]
        return self._of(shard)[max(fitting)] if fitting else None

    def has(self, shard: int, number: int) -> bool:
        """Return whether there is a state at this number of examples."""
        return number in self._of(shard)

    def note(self, shard: int, kept: KeptState) -> None:
        """Keep a state; where it cannot be written, in memory alone."""
        self._of(shard)[kept.number] = kept
        with contextlib.suppress(OSError, TypeError, ValueError):  # a full disk, or a state that is no JSON
            line = json.dumps(kept).encode() + b"\n"
            with open(self._path(shard), "ab", buffering=0) as file:
                file.write(line)  # one call, so that lines of several processes stay apart

    def drop(self, shard: int, number: int) -> None:
        """Forget a state that was not true."""
        self._of(shard).pop(number, None)

    def _of(self, shard: int) -> dict[int, KeptState]:
        if shard not in self._states:
            with contextlib.suppress(OSError):
                self._states[shard] = _parsed(self._path(shard).read_bytes().splitlines())
        return self._states.setdefault(shard, {})

    def _path(self, shard: int) -> pathlib.Path:
        if self._own is None:
            folder = files.cache_folder() / "streams" if self._given is None else pathlib.Path(self._given)
            self._own = folder / self._name().replace(":", "-")
            with contextlib.suppress(OSError):
                self._own.mkdir(parents=True, exist_ok=True)
        return self._own / f"{shard}.states"

    def __getstate__(self) -> dict:
        return {"_given": self._given, "_name": self._name, "_own": self._own, "_states": {}}


def _parsed(lines: Sequence[bytes]) -> dict[int, KeptState]:
    """Return the states by number; a line that a killed process did not finish is left out."""
    found = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            kept = KeptState(*json.loads(line))
            found[kept.number] = kept
    return found

"""The sizes of shards, learned by reading them to their end, kept in a folder so that a later start need not count."""

import collections
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable

from jaxdist.rundir import files


class KeptSizes(collections.UserDict):
    """Sizes by the number of a shard; each is a small file, written whole, so several processes may share a folder.

    Without a folder, they are kept in memory alone. `fingerprint` is called when sizes are first asked for; those of
    other data are not used.
    """

    def __init__(self, folder: str | os.PathLike | None, fingerprint: Callable[[], str]):
        self._folder, self._fingerprint = folder, fingerprint
        self._own: pathlib.Path | None = None
        super().__init__()

    def __contains__(self, shard: object) -> bool:
        if self._folder is not None and self._own is None:
            self._own = pathlib.Path(self._folder) / hashlib.sha256(self._fingerprint().encode()).hexdigest()[:20]
            self._own.mkdir(parents=True, exist_ok=True)
            for path in self._own.glob("*.size"):
                self.data[int(path.stem)] = int(path.read_text())
        return shard in self.data

    def __setitem__(self, shard: int, size: int) -> None:
        self.data[shard] = size
        if self._own is None:
            return
        with contextlib.suppress(OSError):  # a full disk costs the counting, not the run
            files.write_unsynced(self._own / f"{shard}.size", [str(size).encode()])

"""The addresses of the processes of a run: those of its Spec, and in files those of processes that came or moved."""

import contextlib
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping

from jaxdist.launch.supervising import local_job
from jaxdist.paramserver.processes.process_world import write_file
from jaxdist.paramserver.processes.run_folder import ADDRESSES_NAME


class Addresses(Mapping[str, str]):
    """Process name -> `host:port`, as it is at the time of the question.

    `given` are the addresses at the start of the run; its folder has a file for each process that came or moved later.
    """

    def __init__(self, given: Mapping[str, str], directory: pathlib.Path) -> None:
        self._given, self._folder = dict(given), directory / ADDRESSES_NAME
        self._changed_at, self._later = 0, dict[str, str]()

    def _look(self) -> dict[str, str]:
        """Return the later addresses; the files are read again only when one was written."""
        with contextlib.suppress(FileNotFoundError):
            changed_at = self._folder.stat().st_mtime_ns
            # Two files that are written within one tick of the kernel's clock leave the same time.
            if changed_at != self._changed_at or time.time_ns() - changed_at < _TICK_NANOSECONDS:
                files = [path for path in self._folder.iterdir() if path.suffix == _SUFFIX]
                self._later = {path.stem.replace("-", "/"): path.read_text() for path in files}
                self._changed_at = changed_at
        return self._later

    def __getitem__(self, name: str) -> str:
        later = self._look()
        return later[name] if name in later else self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._given, **self._look()})

    def __len__(self) -> int:
        return len({**self._given, **self._look()})


_SUFFIX = ".address"
_TICK_NANOSECONDS = 1_000_000_000


def announce(directory: pathlib.Path, name: str, address: str) -> None:
    """Tell all processes of a run, now and after their restarts, where the process `name` listens."""
    write_file(directory / ADDRESSES_NAME / f"{name.replace('/', '-')}{_SUFFIX}", [address.encode()])


def free_addresses(host: str, count: int) -> list[str]:
    """Return addresses of this machine, `host` with ports that are free."""
    if host == local_job.LOOPBACK:
        return [f"{host}:{port}" for port in local_job.quiet_ports(count)]
    with contextlib.ExitStack() as stack:  # all open at once, so that they differ
        probes = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        return [f"{host}:{probe.getsockname()[1]}" for probe in probes]

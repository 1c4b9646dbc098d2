"""Several machines: which process runs where, and the part of a machine that is not the first.

`ps.hosts` lists addresses, the first being the machine that trains (`jaxdist train`). On each of the others

    JAXDIST_PS_TOKEN=... python -m jaxdist.paramserver.processes.machines RUN_DIR ADDRESS

waits for the run in RUN_DIR, which all machines see, starts the processes of its address, restarts those that die, and
ends with the run, or with status 75 when the machine that trains is gone before the run has ended.
"""

import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterable, Sequence

from jaxdist.errors import ExitStatus, RunFailedError, UserError, as_user_error
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.processes.crew import LocalCrew
from jaxdist.paramserver.protocol.settings import SCHEDULER
from jaxdist.paramserver.wire import security
from jaxdist.rundir import record

_LOOK_SECONDS = 0.2
_GONE_SECONDS = 10.0


def deal(names: Sequence[str], hosts: Sequence[str], first_port: int) -> dict[str, str]:
    """Return each process's HOST:PORT: those of one kind go round the hosts, the scheduler to the first."""
    peers, dealt = {}, dict.fromkeys(("scheduler", "server", "worker"), 0)
    for number, name in enumerate(names):
        kind = name.split("/")[0]
        peers[name] = f"{hosts[dealt[kind] % len(hosts)]}:{first_port + number}"
        dealt[kind] += 1
    return peers


def names_at(peers: dict[str, str], host: str) -> list[str]:
    """Return the processes that run at the address `host`, the observer apart."""
    found = [name for name, address in peers.items() if address.rpartition(":")[0] == host]
    return [name for name in found if name != run_folder.OBSERVER]


def security_of(hosts: Sequence[str]) -> security.Security:
    """Return how the processes prove who they are: as the environment says, else by a new token on one machine.

    Raises:
      ValueError: several machines, and nothing they could all know.
    """
    given = security.Security.read(os.environ)
    for host in hosts:
        given.check(host)
    return given if given.token or given.certificate else security.Security(token=security.new_token())


def main(arguments: Sequence[str]) -> int:
    """Play the part of one machine; return the exit status."""
    try:
        return 0 if _keep_processes(pathlib.Path(arguments[0]), arguments[1]) else ExitStatus.RETRY
    except (UserError, RunFailedError) as error:
        print(f"jaxdist: {error}", file=sys.stderr)
        return error.exit_status


def _keep_processes(run_dir: pathlib.Path, host: str) -> bool:
    """Keep the processes of `host` until they are no longer needed; return whether the run has ended."""
    directory = run_dir / run_folder.DIRECTORY_NAME
    with as_user_error():
        security_of([host])
        spec = _wait_for_run(directory)
        names = names_at(spec.peers, host)
        check_ports([spec.peers[name] for name in names])
    crew = LocalCrew(names, directory, os.environ.get(security.TOKEN, ""))
    crew.start()
    ended = False
    try:
        # A process that died late and starts again learns of the end from the record alone.
        ended = _watch(crew, spec.peers[run_folder.OBSERVER]) or _has_ended(run_dir)
    finally:
        crew.close(orderly=ended)
    return ended


def _wait_for_run(directory: pathlib.Path) -> run_folder.Spec:
    """Return the spec once the machine that trains answers at the address in it: an older run's does not."""
    while True:
        path = directory / run_folder.SPEC_NAME
        if path.exists():
            spec = run_folder.Spec.read(path)
            if _answers(spec.peers[run_folder.OBSERVER]):
                return spec
        time.sleep(_LOOK_SECONDS)


def _watch(crew: LocalCrew, observer: str) -> bool:
    """Look after the processes; return whether they ended by themselves; False when the machine that trains is gone."""
    heard_at = time.monotonic()
    while not crew.all_ended():
        if _answers(observer):
            heard_at = time.monotonic()
            crew.look_after()
        elif time.monotonic() - heard_at > _GONE_SECONDS:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _has_ended(run_dir: pathlib.Path) -> bool:
    """Return True where the machine that trains has written down how the run ended."""
    return record.RunRecord.read(run_dir).end_reason is not None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True


def check(hosts: Sequence[str], settings_names: Sequence[str]) -> None:
    """Raise ValueError where a host would have nothing to do."""
    idle = len(hosts) - max(sum(name.split("/")[0] == kind for name in settings_names) for kind in ("server", "worker"))
    if idle > 0 or len(set(hosts)) < len(hosts):
        raise ValueError(
            f"each of ps.hosts is another machine with at least one worker or server; got {', '.join(hosts)} for "
            f"{len(settings_names) - 1} of them besides the {SCHEDULER}. Leave some out, or set ps.workers higher"
        )


def check_ports(addresses: Iterable[str]) -> None:
    """Raise ValueError where this machine cannot listen on one of the addresses, HOST:PORT each."""
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.create_server((host, int(port))).close()
        except OSError as error:
            raise ValueError(
                f"ps.hosts and ps.port have this machine listen on {address}, and it cannot: "
                f"{os.strerror(error.errno or 0)}. Set ps.port to the first of as many free ports as there are "
                "processes, or correct ps.hosts."
            ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

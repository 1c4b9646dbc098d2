"""Runs on several machines: which process runs where, and the command for every machine but the first.

`ps.hosts` lists addresses, the first being the machine that trains (`jaxdist train`). On each of the others

    JAXDIST_PS_TOKEN=... python -m jaxdist.paramserver.processes.machines RUN_DIR ADDRESS

waits for the run in RUN_DIR, which must be on a file system that all machines share, starts the processes of its
address, restarts those that die, and ends with the run, or with status 75 if the machine that trains is lost first. At
SIGTERM its workers leave after their step. If it is lost itself, its processes are placed on the other machines.
"""

import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterable, Sequence

from jaxdist.config.parameter_server import LAST_PORT
from jaxdist.errors import ExitStatus, RunFailedError, UserError, as_user_error, say
from jaxdist.launch.supervising import local_job
from jaxdist.paramserver.processes import admission, newcomer, run_folder
from jaxdist.paramserver.processes.crew import LocalCrew
from jaxdist.paramserver.protocol.settings import OBSERVER
from jaxdist.paramserver.wire import certificates, security
from jaxdist.rundir import record

_LOOK_SECONDS = 0.2


def assign(names: Sequence[str], hosts: Sequence[str], first_port: int) -> dict[str, str]:
    """Return the HOST:PORT of each process: each role is spread over the hosts in turn, from the first on."""
    peers, assigned = {}, dict.fromkeys(("scheduler", "server", "worker"), 0)
    for number, name in enumerate(names):
        kind = name.split("/")[0]
        peers[name] = f"{hosts[assigned[kind] % len(hosts)]}:{first_port + number}"
        assigned[kind] += 1
    return peers


def names_at(peers: dict[str, str], host: str) -> list[str]:
    """Return the processes that run at the address `host`, except the observer."""
    found = [name for name, address in peers.items() if address.rpartition(":")[0] == host]
    return [name for name in found if name != OBSERVER]


def security_of(hosts: Sequence[str], *, is_told: bool = False) -> security.Security:
    """Return how the processes authenticate: as the environment says, or by a new token if all are on one machine.

    With `is_told` the user is told of certificates that expire soon.

    Raises:
      ValueError: a host is another machine, and the environment has neither a token nor certificates; or the
        certificates cannot be used by the first host, which is this machine.
    """
    given = security.Security.read(os.environ)
    for host in hosts or (local_job.LOOPBACK,):
        given.check(host)
    expires = certificates.check(given, hosts[0] if hosts else local_job.LOOPBACK)
    if is_told:
        certificates.say_if_soon(expires)
    return given if given.token or given.certificate else security.Security(token=security.new_token())


def main(arguments: Sequence[str]) -> int:
    """Run the processes of one machine; return the exit status."""
    try:
        return 0 if _keep_processes(pathlib.Path(arguments[0]), arguments[1]) else ExitStatus.RETRY
    except (UserError, RunFailedError) as error:
        say(error)
        return error.exit_status


def _keep_processes(run_dir: pathlib.Path, host: str) -> bool:
    """Keep the processes of `host` until they are no longer needed; return whether the run has ended."""
    directory = run_dir / run_folder.DIRECTORY_NAME
    with as_user_error():
        security_of([host], is_told=True)
        spec = _wait_for_run(directory)
        check_ports(spec.peers[name] for name in names_at(spec.peers, host))
    with admission.knock(("", spec.door[1]), security.Security.read(os.environ)) as line:
        line.say(hello="machine", host=host)
        names = line.hear().get("names", [])
        if not names:
            raise UserError(
                f"The processes of {host} run on other machines by now, because it was away for long. It can join the "
                f"run with workers: jaxdist join {spec.door[1]}."
            )
        crew = LocalCrew(names, directory, os.environ.get(security.TOKEN, ""))
        status = newcomer.Keeper(line, crew, host).run()
    # A process that is restarted after the end learns of it only from the run record.
    return status == ExitStatus.OK or record.RunRecord.read(run_dir).end_reason is not None


def _wait_for_run(directory: pathlib.Path) -> run_folder.Spec:
    """Return the spec once the machine that trains answers at its address; that of an earlier run does not answer."""
    while True:
        path = directory / run_folder.SPEC_NAME
        if path.exists():
            spec = run_folder.Spec.read(path)
            if _answers(spec.door[1]):
                return spec
        time.sleep(_LOOK_SECONDS)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True


def check(hosts: Sequence[str], settings_names: Sequence[str]) -> None:
    """Raise ValueError if a host would run no worker and no server."""
    idle = len(hosts) - max(sum(name.split("/")[0] == kind for name in settings_names) for kind in ("server", "worker"))
    if idle > 0 or len(set(hosts)) < len(hosts):
        raise ValueError(
            f"ps.hosts must name different machines, each with at least one worker or server; got {', '.join(hosts)} "
            f"for {len(settings_names) - 1} workers and servers. Name fewer hosts, or set ps.workers higher."
        )


def say_without_address(hosts: Iterable[str]) -> None:
    """Tell the user of hosts that have no address. They may get one later, for example as pods that start."""
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            say(f"{host} has no address yet ({error.strerror}). The run waits for its processes.")


def check_ports(addresses: Iterable[str]) -> None:
    """Raise ValueError if this machine cannot listen on one of the addresses (HOST:PORT)."""
    for address in addresses:
        if why := _why_not(address):
            raise ValueError(
                f"With these ps.hosts and ps.port, this machine must listen on {address}, and it cannot: {why}. Set "
                "ps.port to the first of a range of free ports, one for each process, or correct ps.hosts."
            )


def _why_not(address: str) -> str:
    """Return why this machine cannot listen on an address; "" if it can."""
    host, _, port = address.rpartition(":")
    if int(port) > LAST_PORT:
        return f"The last port is {LAST_PORT}"
    try:
        socket.getaddrinfo(host, None)
        socket.create_server((host, int(port))).close()
    except socket.gaierror as error:
        return str(error.strerror)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

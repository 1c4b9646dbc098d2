"""One machine of a parameter-server job that an engine has started on several.

    JAXDIST_PS_HOSTS=node1,node2 python -m jaxdist.cli.machine train EXPERIMENT ... --run-dir RUN_DIR

The engine says which of them this machine is. The first trains; the others keep their processes alive,
see `processes.machines`.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from jaxdist.cli import main as command_line
from jaxdist.cli import parser
from jaxdist.errors import TryAgain, UserError, say
from jaxdist.paramserver.processes import machines

HOSTS = "JAXDIST_PS_HOSTS"
"""Environment variable: the names or addresses of all machines, with commas between."""
_INDICES = ("SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Environment variables of SLURM and of Kubernetes: the number of this machine, from 0."""
_NAMED_SECONDS = 60.0
"""A pod's name resolves for the others only some time after its start."""


def main(arguments: Sequence[str]) -> int:
    """Play the part of this machine; return the exit status."""
    try:
        names, index = place(os.environ)
        found = addresses(names, index)
    except UserError as error:
        say(error)
        return error.exit_status
    if index == 0:
        hosts = ["--set", f"ps.hosts={','.join(found)}"] if len(found) > 1 else []
        return command_line.run([*arguments, "--strategy", parser.PARAMETER_SERVER, *hosts])
    for number in (signal.SIGTERM, signal.SIGUSR1):
        # The first machine receives it as well, stops the run and saves, for which it needs the processes here.
        signal.signal(number, lambda number, frame: None)
    return machines.main([arguments[arguments.index("--run-dir") + 1], found[index]])


def place(environment: Mapping[str, str]) -> tuple[list[str], int]:
    """Return the names of all machines and the number of this one; UserError where the environment does not say."""
    index = next((environment[name] for name in _INDICES if name in environment), None)
    if HOSTS not in environment or index is None:
        raise UserError(
            f"A machine of a parameter server needs {HOSTS} and one of {', '.join(_INDICES)} in the environment; "
            "`jaxdist launch --engine` sets them."
        )
    return environment[HOSTS].split(","), int(index)


def addresses(names: Sequence[str], index: int, *, timeout_seconds: float = _NAMED_SECONDS) -> list[str]:
    """Return the addresses of machines, the same on each of them; `index` is the one that asks.

    A machine's own name may resolve to its loopback interface, which others cannot reach; so a machine takes the
    address that it reaches the others from.

    Raises:
      TryAgain: a name has no address in time.
    """
    found = [_address(name, timeout_seconds) for name in names]
    if len(names) > 1 and found[index] != names[index]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((found[1 if index == 0 else 0], 9))  # chooses a route, and sends nothing
            found[index] = probe.getsockname()[0]
    return found


def _address(name: str, timeout_seconds: float) -> str:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return socket.gethostbyname(name)
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise TryAgain(f"The machine {name!r} has no address after {timeout_seconds:g} s: {error}.") from error
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

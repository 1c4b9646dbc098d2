"""A SLURM of one node on this machine, for as long as a context lasts: munge, the controller and one daemon.

It needs root and the programs of Debian's `slurm-wlm` and `munge`, and installs nothing. Everything it writes is in one
directory, and it listens on the loopback interface.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

from jaxdist.launch.supervising import local_job

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NUM_TASKS = 4
"""CPUs that the node says it has, whatever there are: the tasks of a test wait for each other, not for processors."""


def missing() -> list[str]:
    """Return what is missing: programs, or the permission to start them."""
    found = [name for name in PROGRAMS if shutil.which(name) is None]
    return found if os.geteuid() == 0 else [*found, "root"]


@contextlib.contextmanager
def running(directory: pathlib.Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which SLURM's commands reach the cluster."""
    # munged trusts no directory that others may write to, and pytest's directories are below one.
    for name in ("munge", "state", "spool"):
        (directory / name).mkdir()
    key = directory / "munge" / "key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    (directory / "slurm.conf").write_text(_configuration(directory))
    environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
    munge = [f"--{name}={directory / 'munge' / file}" for name, file in _MUNGE_FILES.items()]
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]]
    with contextlib.ExitStack() as stack:
        for command in daemons:
            log = stack.enter_context(open(directory / f"{command[0]}.out", "wb"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_end, process)
            if command[0] == "munged":
                _until(lambda: (directory / "munge" / "socket").exists())
        _until(lambda: _state(environment) == "idle")
        yield environment
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)
        _until(lambda: _state(environment) == "idle")


_MUNGE_FILES = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _configuration(directory: pathlib.Path) -> str:
    host = socket.gethostname()
    ports = local_job.quiet_ports(2)
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={directory}/munge/socket",
        "CredType=cred/munge",
        f"StateSaveLocation={directory}/state",
        f"SlurmdSpoolDir={directory}/spool",
        f"SlurmctldPidFile={directory}/slurmctld.pid",
        f"SlurmdPidFile={directory}/slurmd.pid",
        f"SlurmctldPort={ports[0]}",
        f"SlurmdPort={ports[1]}",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SlurmdParameters=config_overrides",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs={NUM_TASKS} State=UNKNOWN",
        f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


def _state(environment: dict[str, str]) -> str:
    done = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True)
    return done.stdout.strip()


def _until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the cluster does not get there"
        time.sleep(0.1)


def _end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

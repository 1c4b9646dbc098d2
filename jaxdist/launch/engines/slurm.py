"""SLURM: the batch script of a job, and its submission.

`srun` starts the processes and JAX finds its place in SLURM's environment variables. Some time before the limit, and
when the job is preempted, they get a signal, save and end with status 75; the script then has the job requeued, and it
continues.
"""

import re
import shlex
import shutil
import subprocess
import sys

from jaxdist.errors import ExitStatus, UserError
from jaxdist.launch.engines.request import Request, check_one_line
from jaxdist.rundir import record

SCRIPT_NAME = "launch.sbatch"
MOST_REQUEUES = 100
_DEFAULTS = {"open-mode": "append", "signal": "USR1@120"}
_OPTION = re.compile(r"[a-z][a-z-]*")
_OURS = ("job-name", "nodes", "ntasks-per-node", "chdir", "output", "requeue")
_PARAMETER_SERVER = (
    'export JAXDIST_PS_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"',
    """export JAXDIST_PS_TOKEN="${JAXDIST_PS_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')}\"""",
)
"""What the machines of a parameter server need: each other's names and a secret."""
_WAIT_SECONDS = 60
"""How long the other tasks may run after one has ended: if it was killed, they wait in a collective."""


def script(request: Request, *, directory: str, python: str = sys.executable) -> str:
    """Return the batch script.

    The request's `settings` are long options of sbatch, for example partition; an empty value makes a bare option.

    Raises:
      UserError: a setting that is not a long option, or is set by this module.
    """
    for name in request.settings:
        if not _OPTION.fullmatch(name) or name in _OURS:
            raise UserError(
                f"--with takes long options of sbatch without their dashes, for example partition=gpu, except "
                f"{', '.join(_OURS)}; got {name!r}. Correct it."
            )
    check_one_line({"working directory": directory, "Python interpreter": python})
    options = {
        "job-name": request.name,
        "nodes": str(request.hosts),
        "ntasks-per-node": str(request.processes),
        "chdir": directory,
        "output": str(request.run_dir / "slurm-%j.log"),
        "requeue": "",
        **_DEFAULTS,
        **request.settings,
    }
    directives = [f"#SBATCH --{name}{'=' + shlex.quote(value) if value else ''}" for name, value in options.items()]
    train = shlex.join([python, "-m", request.module, *request.train()])
    return "\n".join(
        [
            "#!/bin/bash",
            *directives,
            *(_PARAMETER_SERVER if request.parameter_server else ()),
            f"srun --wait={_WAIT_SECONDS} {train}",
            "status=$?",
            f"# {ExitStatus.RETRY} asks for another attempt; after a hang a process may not have managed to exit so.",
            f'if [ $status -eq {ExitStatus.RETRY} ] || grep -qs \'"end_reason": "hang"\' '
            f"{shlex.quote(str(request.run_dir / record.FILE_NAME))}; then",
            f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_REQUEUES} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            "fi",
            "exit $status",
            "",
        ]
    )


def submit(request: Request, text: str) -> str:
    """Submit the script, which is kept in the run directory; return the number of the job.

    Raises:
      UserError: SLURM is not installed, or it refuses the job; the message is that of SLURM.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--engine slurm needs the program sbatch; this machine does not have it. Run the command on a login node "
            "of the cluster, or add --dry-run to print the script."
        )
    request.run_dir.mkdir(parents=True, exist_ok=True)
    path = request.run_dir / SCRIPT_NAME
    path.write_text(text)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}. Correct it with --with.")
    return done.stdout.strip().partition(";")[0]

"""Settings that are secrets: files, command lines and environments show `***` in place of their values.

The processes of a run read the values from the memory of the process that started them. Their environment says where:
it may end in a report of an experiment tracker or of a crash.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

from jaxdist.errors import UserError
from jaxdist.rundir import record

SECRETS = "JAXDIST_SECRET_SETTINGS"
"""Environment variable of the processes of a run: the file in memory with the assignments that their arguments hide, or
those assignments as JSON, for processes of other machines."""


def shown(assignments: Sequence[str], experiment: object) -> dict[str, str]:
    """Return each of the assignments that sets a secret, and what is shown in its place.

    Secret are fields declared `repr=False`, which the run record leaves out, and those named like a secret.
    """
    return {
        assignment: f"{name}={record.HIDDEN}"
        for assignment in assignments
        for name in [assignment.partition("=")[0]]
        if record.is_secret(name) or _is_left_out(experiment, name.split("."))
    }


def without(assignments: Sequence[str], experiment: object) -> list[str]:
    """Return the assignments that set no secret."""
    secret = shown(assignments, experiment)
    return [each for each in assignments if each not in secret]


def hide(assignments: Sequence[str], experiment: object, arguments: Sequence[str]) -> list[str]:
    """Return `arguments` with the secrets among `assignments` hidden, for the processes that this one starts.

    They find the secrets while this process lives.
    """
    hidden = shown(assignments, experiment)
    if hidden:
        content = json.dumps({instead: assignment for assignment, instead in hidden.items()})
        memory = os.memfd_create("jaxdist-secrets")  # stays open: processes are started again
        os.write(memory, content.encode())
        os.environ[SECRETS] = f"/proc/{os.getpid()}/fd/{memory}"
    return [hidden.get(argument, argument) for argument in arguments]


def for_other_machines() -> dict[str, str]:
    """Return the environment variables that bring the secrets to processes that cannot read this one's memory."""
    return {SECRETS: json.dumps(_hidden())} if SECRETS in os.environ else {}


def reveal(assignments: Sequence[str]) -> list[str]:
    """Return the assignments with the values that the process which started this one hides."""
    secrets = _hidden()
    return [secrets.get(assignment, assignment) for assignment in assignments]


def _hidden() -> dict[str, str]:
    """Return the hidden assignments by what is shown in place of each."""
    found = os.environ.get(SECRETS, "{}")
    secrets: dict[str, str] = json.loads(pathlib.Path(found).read_bytes() if found.startswith("/proc/") else found)
    return secrets


def refuse(assignments: Sequence[str], experiment: object, what: str) -> None:
    """Raise UserError for a secret among the assignments; `what` must hold none, for example "A batch script"."""
    if hidden := shown(assignments, experiment):
        names = ", ".join(each.partition("=")[0] for each in hidden.values())
        raise UserError(
            f"{what} must hold no secret; got {names}. Have the experiment's file read it from an environment "
            "variable, and leave it out of --set."
        )


def _is_left_out(value: object, path: Sequence[str]) -> bool:
    """Return whether a field on the way from `value` along `path` is declared `repr=False`."""
    for name in path:
        if not dataclasses.is_dataclass(value):
            return False
        if any(field.name == name and not field.repr for field in dataclasses.fields(value)):
            return True
        value = getattr(value, name, None)
    return False

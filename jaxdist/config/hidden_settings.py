"""Settings that are secrets: files and command lines show `***` in place of their values.

The processes of a run get the values through their environment, which only its owner may read.
"""

import dataclasses
import json
import os
from collections.abc import Sequence

from jaxdist.errors import UserError
from jaxdist.rundir import record

SECRETS = "JAXDIST_SECRET_SETTINGS"
"""Environment variable of the processes of a run: the assignments whose values their arguments hide, as JSON."""


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
    """Return `arguments` with the secrets among `assignments` hidden, which go into the environment of this process."""
    hidden = shown(assignments, experiment)
    if hidden:
        os.environ[SECRETS] = json.dumps({instead: assignment for assignment, instead in hidden.items()})
    return [hidden.get(argument, argument) for argument in arguments]


def reveal(assignments: Sequence[str]) -> list[str]:
    """Return the assignments with the values that the environment of this process holds."""
    secrets = json.loads(os.environ.get(SECRETS, "{}"))
    return [secrets.get(assignment, assignment) for assignment in assignments]


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

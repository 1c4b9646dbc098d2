"""The experiment that a command line selects, with its overrides; and the same selection as arguments of a command."""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence

from jaxdist.config.experiment import Experiment
from jaxdist.config.loading import load_experiment
from jaxdist.config.overrides import override
from jaxdist.errors import UserError
from jaxdist.launch import waiting
from jaxdist.rundir import record

SECRETS = "JAXDIST_SECRET_SETTINGS"
"""Environment variable of the processes of a job: the assignments whose values their arguments hide, as JSON."""


def load(options: argparse.Namespace) -> Experiment:
    """Return the experiment that the command line selects, with its overrides."""
    silent = getattr(options, "json", False)
    with record_alone_on_stdout(options), waiting.shown(f"loading {options.experiment}", silent=silent):
        experiment = override(load_experiment(options.experiment), assignments(options))
    options.command = shown_command(options, experiment)
    return experiment


def shown_command(options: argparse.Namespace, experiment: Experiment) -> str:
    """Return the command line for the run record, the values of secret settings replaced by `***`.

    Secret are fields declared `repr=False`, which the run record leaves out, and those named like a secret.
    """
    shown = _shown(options, experiment)
    arguments = getattr(options, "arguments", [])
    return shlex.join(["jaxdist", *(shown.get(argument, argument) for argument in arguments)])


def _shown(options: argparse.Namespace, experiment: Experiment) -> dict[str, str]:
    """Return each assignment of a secret, and what is shown in its place."""
    return {
        assignment: f"{name}={record.HIDDEN}"
        for assignment in options.assignments
        for name in [assignment.partition("=")[0]]
        if record.is_secret(name) or _is_left_out(experiment, name.split("."))
    }


def without_secrets(options: argparse.Namespace, experiment: Experiment) -> list[str]:
    """Return what the command line changes in the experiment, as assignments, but for secrets; for the run record."""
    secret = {assignment.partition("=")[0] for assignment in _shown(options, experiment)}
    return [each for each in assignments(options) if each.partition("=")[0] not in secret]


def hide_secrets(options: argparse.Namespace, experiment: Experiment, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a process of the job; the secrets among them go through its environment instead.

    Anyone on the machine may read the arguments of a process, the environment only its owner.
    """
    shown = _shown(options, experiment)
    if shown:
        os.environ[SECRETS] = json.dumps({hidden: assignment for assignment, hidden in shown.items()})
    return [shown.get(argument, argument) for argument in arguments]


def refuse_secrets(options: argparse.Namespace, experiment: Experiment) -> None:
    """Raise UserError for a secret on the command line: what an engine is handed can be read by others."""
    shown = _shown(options, experiment)
    if shown:
        names = ", ".join(hidden.partition("=")[0] for hidden in shown.values())
        raise UserError(
            f"A batch script or manifest must hold no secret; got {names}. Have the experiment's file read it from an "
            "environment variable, and leave it out of --set."
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


def record_alone_on_stdout(options: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    """With --json, send what experiments and writers print to standard error: standard output has one JSON object."""
    return contextlib.redirect_stdout(sys.stderr) if getattr(options, "json", False) else contextlib.nullcontext()


def assignments(options: argparse.Namespace) -> list[str]:
    """Return what the command line changes in the experiment, as assignments."""
    secrets = json.loads(os.environ.get(SECRETS, "{}"))
    found = [secrets.get(assignment, assignment) for assignment in options.assignments]
    found += [f"strategy={options.strategy}"] if options.strategy else []
    found += [f"reduction={options.reduction}"] if options.reduction else []
    found += [f"stop.max_steps={options.max_steps}"] if options.max_steps else []
    return found


def as_arguments(options: argparse.Namespace, *, before: Sequence[str] = (), after: Sequence[str] = ()) -> list[str]:
    """Return the same selection as arguments of `jaxdist train`, with assignments before and after the user's own."""
    arguments = []
    for flag in ("devices", "strategy", "reduction", "max_steps"):
        value = getattr(options, flag)
        arguments += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    settings = [*before, *options.assignments, *after]
    return [*arguments, "--set", *settings] if settings else arguments

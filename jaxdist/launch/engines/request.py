"""The job that `jaxdist launch` starts, described in the same way for every engine."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from jaxdist.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A job to be started.

    Attributes:
      name: name of the experiment.
      experiment: path of its file, the same on every host.
      arguments: arguments of `jaxdist train` besides the experiment and the run directory.
      run_dir: run directory, on a file system that all hosts share.
      hosts: number of hosts.
      processes: number of processes on each host.
      parameter_server: whether one process on each host places the servers and workers of a parameter server.
      settings: settings of the engine, given as `--with KEY=VALUE`.
    """

    name: str
    experiment: pathlib.Path
    arguments: Sequence[str]
    run_dir: pathlib.Path
    hosts: int = 1
    processes: int = 1
    parameter_server: bool = False
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # In a batch script, text after a line break would be another command.
        texts = {"name of the experiment": self.name, "path of the experiment": str(self.experiment)}
        texts |= {"run directory": str(self.run_dir)}
        texts |= {f"argument {argument!r}": argument for argument in self.arguments}
        texts |= {f"--with {name}": value for name, value in self.settings.items()}
        check_one_line(texts)

    def train(self) -> list[str]:
        """Return the arguments of the `jaxdist` command that each process runs; the command can be restarted."""
        return ["train", str(self.experiment), *self.arguments, "--run-dir", str(self.run_dir), "--restartable"]

    @property
    def module(self) -> str:
        """The Python module that each process runs, with the arguments of `train`."""
        return "jaxdist.cli.machine" if self.parameter_server else "jaxdist.cli"

    def only(self, engine: str, known: Sequence[str], required: Sequence[str] = ()) -> Mapping[str, str]:
        """Return the settings; raise UserError if one is not `known` or a `required` one is missing."""
        unknown = sorted(set(self.settings) - set(known))
        missing = [name for name in required if name not in self.settings]
        if unknown or missing:
            said = f"{unknown[0]!r} is none of them" if unknown else f"{missing[0]} is missing"
            raise UserError(f"--with takes these settings of {engine}: {', '.join(known)}; {said}. Correct it.")
        return self.settings

    def whole(self, name: str, default: int) -> int:
        """Return a setting that is a whole number; raise UserError if it is not one."""
        text = self.settings.get(name, str(default))
        if not text.isdigit():
            raise UserError(f"--with {name} takes a whole number; got {text!r}.")
        return int(text)


def check_one_line(texts: Mapping[str, str]) -> None:
    """Raise UserError if a text (by its name for messages) contains control characters such as line breaks."""
    for name, text in texts.items():
        if not text.isprintable():
            raise UserError(
                f"A value for an engine must be one line of printable characters; {name} is {text!r}. "
                "Rename or correct it."
            )


def settings_of(assignments: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE assignments as a dict; raise UserError for anything else."""
    for assignment in assignments:
        if not assignment.partition("=")[0] or "=" not in assignment:
            raise UserError(f"--with takes KEY=VALUE; got {assignment!r}.")
    return {key: value for key, _, value in (assignment.partition("=") for assignment in assignments)}

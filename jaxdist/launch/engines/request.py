"""What `jaxdist launch` was asked for, whatever engine starts it."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from jaxdist.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A job to be started.

    Attributes:
      name: of the experiment.
      experiment: path of its file, the same on every host.
      arguments: of `jaxdist train` besides the experiment and the run directory.
      run_dir: on a file system that all hosts share.
      hosts: how many.
      processes: on each host.
      parameter_server: its servers and workers are to be placed, by one process on each host.
      settings: what the engine is told, as `--with KEY=VALUE` says it.
    """

    name: str
    experiment: pathlib.Path
    arguments: Sequence[str]
    run_dir: pathlib.Path
    hosts: int = 1
    processes: int = 1
    parameter_server: bool = False
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def train(self) -> list[str]:
        """Return the arguments of the `jaxdist` command that each process runs; it can be started again and again."""
        return ["train", str(self.experiment), *self.arguments, "--run-dir", str(self.run_dir), "--restartable"]

    @property
    def module(self) -> str:
        """The Python module that each process runs, with the arguments of `train`."""
        return "jaxdist.cli.machine" if self.parameter_server else "jaxdist.cli"

    def only(self, engine: str, known: Sequence[str], required: Sequence[str] = ()) -> Mapping[str, str]:
        """Return the settings; UserError where one is not `known` or a `required` one is missing."""
        unknown = sorted(set(self.settings) - set(known))
        missing = [name for name in required if name not in self.settings]
        if unknown or missing:
            said = f"{unknown[0]!r} is none of them" if unknown else f"{missing[0]} is missing"
            raise UserError(f"--with takes these settings of {engine}: {', '.join(known)}; {said}. Correct it.")
        return self.settings


def settings_of(assignments: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE assignments as a dict; UserError for anything else."""
    for assignment in assignments:
        if not assignment.partition("=")[0] or "=" not in assignment:
            raise UserError(f"--with takes KEY=VALUE; got {assignment!r}.")
    return {key: value for key, _, value in (assignment.partition("=") for assignment in assignments)}

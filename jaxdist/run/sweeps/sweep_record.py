"""The record of a sweep, `sweep.json` in its directory: what it tries, and what no run record says of its trials.

How a trial ended, and its metrics, are in its own run directory. Here is what was refused before there was one, and
what failed. A sweep that was killed continues from these two.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from jaxdist.errors import ConfigError
from jaxdist.rundir import files, json_kinds, record

FILE_NAME = "sweep.json"
Method: TypeAlias = Literal["grid", "random", "optuna"]
_MOST_CHARACTERS = 60
_AGAIN = (None, "preempted", "hang", "error")
"""End reasons of runs that are continued."""


@dataclasses.dataclass
class Trial:
    """One run of a sweep.

    Attributes:
      number: from 0, in the order in which trials begin.
      name: of its directory, in that of the sweep.
      settings: what it changes in the experiment, name -> text.
      refused: why its settings cannot be used, or None.
      failed: what ended it with an error, or None; a sweep that is resumed tries it again.
    """

    number: int
    name: str
    settings: dict[str, str]
    refused: str | None = None
    failed: str | None = None

    @classmethod
    def make(cls, number: int, settings: Mapping[str, str]) -> "Trial":
        """Return a trial whose directory is named after its settings."""
        short = "-".join(f"{path.rpartition('.')[2]}={value}" for path, value in settings.items())
        name = re.sub(r"[^\w.=+-]+", "_", f"{number:03}-{short}")[:_MOST_CHARACTERS]
        return cls(number, name, dict(settings))

    @property
    def assignments(self) -> list[str]:
        """The settings as `--set` takes them."""
        return [f"{path}={text}" for path, text in self.settings.items()]


@dataclasses.dataclass
class Sweep:
    """What a sweep tries, and its trials.

    Attributes:
      experiment: name of the experiment.
      assignments: what the command line changes in every trial, without secrets.
      over: what `--over` said.
      method: how the trials are chosen.
      num_trials: how many there will be.
      seed: of what is drawn.
      metric: the trials are ranked by it.
      mode: whether larger or smaller values are better.
      trials: those that are planned or made so far.
    """

    experiment: str
    assignments: list[str]
    over: list[str]
    method: Method
    num_trials: int
    seed: int
    metric: str
    mode: Literal["max", "min"]
    trials: list[Trial] = dataclasses.field(default_factory=list)

    def write(self, sweep_dir: pathlib.Path) -> None:
        """Replace the record in `sweep_dir` atomically."""
        files.write_text(sweep_dir / FILE_NAME, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, sweep_dir: pathlib.Path) -> "Sweep":
        """Return the record in `sweep_dir`.

        Raises:
          ConfigError: there is none, or it is damaged.
        """
        path = sweep_dir / FILE_NAME
        try:
            content = json.loads(path.read_bytes())
            if wrong := json_kinds.misfit(content, cls, ""):
                raise ValueError(wrong)
            return cls(**content | {"trials": [Trial(**trial) for trial in content["trials"]]})
        except FileNotFoundError as error:
            raise ConfigError(f"A sweep is resumed from its {FILE_NAME}; {sweep_dir} has none.") from error
        except (ValueError, TypeError, RecursionError) as error:  # TypeError: a key of a later version
            raise ConfigError(
                f"{path} is not the record of a sweep: {error}. Move it away, or name another directory."
            ) from error

    def check_continues(self, earlier: "Sweep", sweep_dir: pathlib.Path) -> None:
        """Raise ConfigError unless this is the sweep `earlier`, with as many trials or, where these are drawn, more."""
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(earlier, field.name)
            more = field.name == "num_trials" and self.method != "grid" and ours > theirs
            if field.name != "trials" and ours != theirs and not more:
                raise ConfigError(
                    f"{sweep_dir} holds another sweep: {field.name} was {theirs} there, and is {ours} now. Set it as "
                    "it was, or choose another --sweep-dir."
                )


def is_sweep(path: pathlib.Path) -> bool:
    """Return whether a directory is that of a sweep."""
    return (path / FILE_NAME).is_file()


def run_of(sweep_dir: pathlib.Path, trial: Trial) -> record.RunRecord | None:
    """Return the run record of a trial; None before it has one, or if it is damaged."""
    return record.readable(sweep_dir / trial.name)


def is_over(sweep_dir: pathlib.Path, trial: Trial) -> bool:
    """Return whether a trial has ended, so that it is not run again."""
    if trial.refused is not None:
        return True
    made = run_of(sweep_dir, trial)
    return made is not None and trial.failed is None and made.end_reason not in _AGAIN


def run_dirs(sweep_dir: pathlib.Path) -> list[pathlib.Path]:
    """Return the run directories of a sweep that have a record, in the order of its trials."""
    found = [sweep_dir / trial.name for trial in Sweep.read(sweep_dir).trials]
    return [path for path in found if (path / record.FILE_NAME).is_file()]


def expand(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Return run directories, those of a sweep in its place."""
    return [each for path in paths for each in (run_dirs(path) if is_sweep(path) else [path])]

"""The trials of a sweep from best to worst, and the table of them."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError
from jaxdist.run import components
from jaxdist.run.sweeps import sweep_record
from jaxdist.rundir import record
from jaxdist.rundir.writers import format_number
from jaxdist.stop import Mode


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A trial in the ranking.

    Attributes:
      trial: as the sweep records it.
      ended: its end reason; refused or failed; running or waiting where it has not ended.
      value: of the metric, None where there is none that is finite.
      step: at which it was reached.
      seconds: wall time over all attempts.
      compile_seconds: those of them spent compiling.
      compile_count: how often its step was compiled: 0 where it shared the program of an earlier trial.
    """

    trial: sweep_record.Trial
    ended: str
    value: float | None
    step: int
    seconds: float
    compile_seconds: float
    compile_count: int

    @property
    def works(self) -> bool:
        """Whether the run ended by itself with a value."""
        return self.value is not None and self.ended not in (*_BAD, "refused", "failed", "running", "waiting")

    def to_json(self, sweep_dir: pathlib.Path) -> dict[str, Any]:
        """Return it as plain data."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "trial"}
        return dataclasses.asdict(self.trial) | values | {"run_dir": str(sweep_dir / self.trial.name)}


_BAD = ("nonfinite", "error", "hang", "preempted")


def choose_metric(experiment: Experiment, metric: str | None = None, mode: Mode | None = None) -> tuple[str, Mode]:
    """Return what trials are ranked by, and which of its values are good.

    That is the metric asked for, else the one whose best state the experiment keeps or that ends it, else the loss on
    its held-out examples, else that of training.

    Raises:
      ConfigError: a metric of held-out examples, of which there are none, or one without a direction.
    """
    watched, direction = components.watched_metric(experiment)
    held_out = experiment.data.eval
    if metric is None and mode is not None and watched is None:
        raise ConfigError("--mode says which values of --metric are good, and there is no --metric. Name one.")
    if metric is None and watched is not None:
        return watched, mode or direction
    if metric is None:
        first = f"{next(iter(held_out))}/" if isinstance(held_out, dict) else ""
        return ("train/loss" if held_out is None else f"eval/{first}loss"), "min"
    if metric.startswith("eval/") and held_out is None:
        raise ConfigError(f"--metric {metric} is of held-out examples, and the experiment has no data.eval.")
    if mode is None and metric != watched and not metric.endswith("loss"):
        raise ConfigError(f"Whether large or small values of {metric} are good is not known. Add --mode max or min.")
    return metric, mode or (direction if metric == watched else "min")


def rank(sweep_dir: pathlib.Path, sweep: sweep_record.Sweep) -> list[Ranked]:
    """Return the trials from best to worst; of equal values the one reached first, and those without one last."""
    sign = -1.0 if sweep.mode == "max" else 1.0

    def order(each: Ranked) -> tuple[bool, float, int, int]:
        value = math.inf if each.value is None else sign * each.value
        return not each.works, value, each.step, each.trial.number

    return sorted((ranked(sweep_dir, sweep, trial) for trial in sweep.trials), key=order)


def ranked(sweep_dir: pathlib.Path, sweep: sweep_record.Sweep, trial: sweep_record.Trial) -> Ranked:
    """Return a trial with what its run record says."""
    made = sweep_record.run_of(sweep_dir, trial)
    if made is None:
        ended = "refused" if trial.refused else "failed" if trial.failed else "waiting"
        return Ranked(trial, ended, None, 0, 0.0, 0.0, 0)
    value, step = value_of(made, sweep.metric)
    seconds = made.time_seconds
    ended = "failed" if trial.failed else made.end_reason or "running"
    return Ranked(trial, ended, value, step, sum(seconds.values()), seconds.get("compile", 0.0), made.compile_count)


def value_of(made: record.RunRecord, metric: str) -> tuple[float | None, int]:
    """Return the value of a run and its step: the best where the run watched the metric, else the last one."""
    best = made.extra.get("best")
    if best and best["metric"] == metric:
        return best["value"], best["step"]
    value = made.metrics.get(metric)
    return (None if value is None or not math.isfinite(value) else value), made.step


def columns(sweep: sweep_record.Sweep) -> dict[str, str]:
    """Return the heads of the columns of the settings: the last part of each name, where that is enough."""
    paths = [text.partition("=")[0] for text in sweep.over]
    short = [path.rpartition(".")[2] for path in paths]
    return {path: name if short.count(name) == 1 else path for path, name in zip(paths, short, strict=True)}


def table(sweep: sweep_record.Sweep, found: Sequence[Ranked], *, width: int = 80) -> str:
    """Return the ranking as a table of at most `width` columns; where there is no room, less is said of each trial."""
    heads = columns(sweep)
    names = ["rank", *heads.values(), sweep.metric, "step", "ended", "seconds", "trial"]
    rows = [_row(place, each, heads) for place, each in enumerate(found, 1)]
    left_out: list[str] = []
    for name in ("", "trial", "seconds", "step"):
        left_out.append(name)
        kept = [index for index, each in enumerate(names) if each not in left_out or each in heads.values()]
        cells = [[row[index] for index in kept] for row in ([*names], *rows)]
        if _width(cells) <= width:
            break
    return "\n".join(_aligned(cells, width))


def _row(place: int, each: Ranked, heads: dict[str, str]) -> list[str]:
    settings = [each.trial.settings.get(path, "") for path in heads]
    value = "-" if each.value is None else format_number(each.value)
    step, seconds = (str(each.step), f"{each.seconds:.1f}") if each.step else ("-", "-")
    return [str(place) if each.works else "-", *settings, value, step, each.ended, seconds, str(each.trial.number)]


def _width(cells: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*cells, strict=True)) - 2


def _aligned(cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the lines; cells that leave too little room are cut, the widest columns first."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + 2 * len(widths) - 2 > width and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in cells:
        cut = [cell if len(cell) <= size else f"{cell[: size - 1]}…" for cell, size in zip(row, widths, strict=True)]
        lines.append("  ".join(cell.ljust(size) for cell, size in zip(cut, widths, strict=True)))
    return [line.rstrip()[:width] for line in lines]

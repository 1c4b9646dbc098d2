"""Chaos: run an experiment twice, undisturbed and with faults, and check that both runs made the same model.

Its processes are killed, stopped and denied the disk at random steps and at random moments of their start; others join
it and leave. The plan is drawn from a seed before anything starts. All of it comes from outside the job.
"""

import collections
import dataclasses
import functools
import pathlib
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdist.errors import ExitStatus, RunFailedError, UserError
from jaxdist.launch.supervising.chaos import chaos_changes, striker, strikes, supervised_job
from jaxdist.rundir import ledger, record

_SHOWN_LINES = 5


@dataclasses.dataclass(frozen=True)
class ChaosResult:
    """The result of a chaos run.

    Attributes:
      planned: number of strikes planned, joins and leaves among them.
      hits: those delivered to single processes and recovered from.
      num_changes: planned joins and leaves that took effect.
      changes: restarts, joins and leaves as the run record has them.
      restarts: attempts after the first.
      undisturbed: params_sha256 and steps of the undisturbed run.
      disturbed: the same of the run with faults.
      ledger: "exact", or what is wrong with the ledger.
    """

    planned: int
    hits: Sequence[strikes.Hit]
    restarts: int
    undisturbed: tuple[str | None, int]
    disturbed: tuple[str | None, int]
    ledger: str
    num_changes: int = 0
    changes: Sequence[Mapping[str, Any]] = ()

    @property
    def identical(self) -> bool:
        """Whether both runs made the same params in the same number of steps, from the same examples."""
        return self.undisturbed == self.disturbed and self.undisturbed[0] is not None and self.ledger == "exact"

    @property
    def made(self) -> int:
        """How many of the planned strikes took effect."""
        return len(self.hits) + self.num_changes

    @property
    def proves(self) -> bool:
        """Whether they did although something happened to one of them."""
        return self.identical and bool(self.made or self.changes)

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        stops = [hit for hit in self.hits if hit.strike.kind == "stop"]
        stages = {name for hit in self.hits for name in hit.stages}
        kinds: Sequence[strikes.Kind] = ("kill", "stop", "starve")
        return {
            "identical": self.identical,
            "params_sha256": {"undisturbed": self.undisturbed[0], "disturbed": self.disturbed[0]},
            "steps": {"undisturbed": self.undisturbed[1], "disturbed": self.disturbed[1]},
            "ledger": self.ledger,
            "planned": self.planned,
            "made": self.made,
            "strikes": {kind: sum(hit.strike.kind == kind for hit in self.hits) for kind in kinds},
            "struck": dict(sorted(collections.Counter(hit.name for hit in self.hits).items())),
            "restarts": self.restarts,
            "changes": {kind: self._change_costs(kind) for kind in ("join", "leave")},
            "verdicts": {"right": sum(hit.named for hit in stops), "of": len(stops)},
            "verdict_seconds": _summary([hit.verdict[1] for hit in stops if hit.verdict]),
            "lost_seconds": _summary([hit.seconds for hit in self.hits]),
            "split_seconds": {
                stage: _summary([hit.stages[stage] for hit in self.hits if stage in hit.stages])
                for stage in supervised_job.STAGES
                if stage in stages
            },
        }

    def _change_costs(self, kind: str) -> dict[str, float | None]:
        costs = [change["seconds_lost"] for change in self.changes if change["kind"] == kind]
        return {"count": len(costs)} | _summary([seconds for seconds in costs if seconds is not None])

    def _changes_line(self) -> list[str]:
        costs = {kind: self._change_costs(kind) for kind in ("join", "leave")}
        parts = [
            f"{cost['count']} x {kind}" + ("" if cost["p50"] is None else f" ({_shown(cost)} s lost)")
            for kind, cost in costs.items()
            if cost["count"]
        ]
        if not parts:
            return []
        numbers = " ".join(str(change["processes"]) for change in self.changes if change["kind"] != "restart")
        return [f"changes     {', '.join(parts)}", f"processes   {numbers}"]

    def _stages_lines(self) -> list[str]:
        """Return the lines on stages and verdicts, which only a supervised job has."""
        content = self.to_json()
        if not content["split_seconds"]:
            return []
        stages = ", ".join(f"{stage} {seconds['p50']:.1f}" for stage, seconds in content["split_seconds"].items())
        right, after = content["verdicts"], content["verdict_seconds"]
        lines = [f"of these    p50 {stages}"]
        if right["of"]:
            named = "" if after["p50"] is None else f", after {_shown(after)} s"
            lines.append(f"verdicts    {right['right']} of {right['of']} stopped processes named{named}")
        return lines

    def __str__(self) -> str:
        content = self.to_json()
        counts, lost = content["strikes"], content["lost_seconds"]
        lines = [
            f"strikes     {counts['kill']} kills, {counts['stop']} stops, {counts['starve']} starved of disk "
            f"(with joins and leaves {self.made} of {self.planned} planned)",
            f"struck      {', '.join(f'{name} x {count}' for name, count in content['struck'].items()) or 'none'}",
            *self._changes_line(),
            f"restarts    {self.restarts}",
            *([f"seconds     {_shown(lost)} from a strike to the next new step"] if self.hits else []),
            *self._stages_lines(),
            f"steps       {self.undisturbed[1]} undisturbed, {self.disturbed[1]} disturbed",
            f"params      {self.undisturbed[0]} undisturbed",
            f"            {self.disturbed[0]} disturbed",
            f"examples    {self.ledger}",
            "identical" if self.identical else "NOT identical",
        ]
        if self.identical and not self.proves:
            lines[-1] = "nothing was struck before the run ended, which proves nothing: train longer, with --max-steps"
        elif self.identical and self.made < self.planned:
            lines[-1] += (
                f" after {self.made} of {self.planned} strikes; the run ended before the others: train longer, with "
                "--max-steps"
            )
        return "\n".join(lines)


def run(
    command: Sequence[str],
    directory: pathlib.Path,
    *,
    seed: int,
    num_processes: int,
    num_examples: int,
    counts: Mapping[str, int],
    make_job: Callable[[pathlib.Path], striker.JobUnderFire] = supervised_job.SupervisedJob,
    num_changing: int | None = None,
) -> ChaosResult:
    """Run `command` (with `--run-dir` added) undisturbed and with faults; return the report.

    The command trains in several processes and records the ledger. `directory` gets the run directories `undisturbed`
    and `disturbed`, in each of which `make_job` returns the job; for `counts` and `num_changing` see `strikes.plan`.

    Raises:
      UserError: joins and leaves differ too much, `directory` has runs already, or the command refuses the experiment.
      RunFailedError: a run failed.
    """
    calm_dir, struck_dir = directory / "undisturbed", directory / "disturbed"
    size = num_changing or num_processes
    plan = functools.partial(strikes.plan, seed, num_processes=num_processes, num_changing=size, **counts)
    plan(num_steps=1)  # which refuses an impossible one now
    _make(calm_dir, struck_dir)
    undisturbed = _train(command, calm_dir)
    planned = plan(num_steps=undisturbed.step)
    with (
        chaos_changes.Commands(struck_dir, seed) as commands,
        striker.Striker(make_job(struck_dir), planned, commands, size=size) as struck,
    ):
        disturbed = _train(command, struck_dir)
    return ChaosResult(
        planned=len(planned),
        hits=struck.hits,
        num_changes=struck.changes,
        restarts=disturbed.restarts,
        undisturbed=(undisturbed.params_sha256, undisturbed.step),
        disturbed=(disturbed.params_sha256, disturbed.step),
        ledger=compare_ledgers(calm_dir, struck_dir, num_examples=num_examples),
        changes=disturbed.extra.get("changes", ()),
    )


def _make(*run_dirs: pathlib.Path) -> None:
    """Make the run directories."""
    for run_dir in run_dirs:
        if run_dir.exists():
            raise UserError(f"Chaos compares two new runs, and {run_dir} exists. Choose another --directory.")
    for run_dir in run_dirs:
        run_dir.mkdir(parents=True)


def compare_ledgers(calm_dir: pathlib.Path, struck_dir: pathlib.Path, *, num_examples: int) -> str:
    """Return "exact" if both runs used each example of each epoch once, in the same steps; else what is wrong."""
    try:
        undisturbed, disturbed = ledger.read(calm_dir), ledger.read(struck_dir)
        ledger.check(disturbed, num_examples=num_examples)
    except ledger.LedgerError as error:
        return str(error)
    return (
        "exact"
        if undisturbed == disturbed
        else "each example was used once, but not in the steps of the undisturbed run"
    )


def _train(command: Sequence[str], run_dir: pathlib.Path) -> record.RunRecord:
    """Run the command to its end; return the run record."""
    output_path = run_dir / "output.txt"
    with (
        open(output_path, "wb") as output,
        subprocess.Popen([*command, "--run-dir", str(run_dir)], stdout=output, stderr=subprocess.STDOUT) as job,
    ):
        try:
            status = job.wait()
        finally:
            job.terminate()  # if an exception such as Ctrl-C ends this process, the job ends too
    if not status:
        return record.RunRecord.read(run_dir)
    told = "\n".join(output_path.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])
    if status == ExitStatus.USER:
        shutil.rmtree(run_dir)
        raise UserError(told.removeprefix("jaxdist: "))
    raise RunFailedError(f"The {run_dir.name} run ended with status {status}; all it said is in {output_path}.\n{told}")


def _summary(seconds: Sequence[float]) -> dict[str, float | None]:
    return {"p50": statistics.median(seconds), "max": max(seconds)} if seconds else {"p50": None, "max": None}


def _shown(summary: Mapping[str, float | None]) -> str:
    return f"p50 {summary['p50']:.1f}, max {summary['max']:.1f}"

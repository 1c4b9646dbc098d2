"""Chaos: run an experiment twice, undisturbed and with faults, and check that both runs made the same model.

Its processes are killed, stopped and denied the disk at random steps and at random moments of their start; others join
it and leave. The plan is drawn from a seed before anything starts. All of it comes from outside the job, which is
observed only through the supervisor's events and the reports on the board.
"""

import dataclasses
import os
import pathlib
import random
import resource
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxdist.launch.supervising import board, chaos_changes, restart_events
from jaxdist.rundir import ledger, record

Kind = Literal["kill", "stop", "starve", "join", "leave"]

_POLL_SECONDS = 0.005
_STAGES = ("detect", "restart", "restore", "compile")
_NUM_STAGES = len(_STAGES) - 1
_EARLY_SHARE = 0.25
_EARLY_SECONDS = 6.0


@dataclasses.dataclass(frozen=True)
class Strike:
    """What is done to one process, and when.

    Attributes:
      kind: "kill" (SIGKILL), "stop" (SIGSTOP: alive, but does nothing), "starve" (it can write no file any more), or
        "join" and "leave", which change the number of processes.
      process: number of the process; of a job that has fewer at the time, counted on from 0.
      step: when it reports this step.
      early_seconds: None, or, instead of `step`, the seconds after the start of an attempt: while it imports, connects,
        restores or compiles.
      num_processes: of "join" and "leave", how many processes there are afterwards.
    """

    kind: Kind
    process: int
    step: int
    early_seconds: float | None = None
    num_processes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lost:
    """The seconds from a strike to the next new step, by stage.

    Attributes:
      detect: until the next attempt was started, including attempts in between that failed.
      restart: until all its processes had joined and built what they train.
      restore: until all had restored their state.
      compile: until the step was made, including compilation (mostly from the cache) and repeated steps.
    """

    detect: float
    restart: float
    restore: float
    compile: float

    @property
    def total(self) -> float:
        """The sum of all stages."""
        return self.detect + self.restart + self.restore + self.compile


@dataclasses.dataclass(frozen=True)
class Hit:
    """A strike that was delivered, and what it cost.

    Attributes:
      strike: what was done.
      lost: how long it took to recover.
      verdict: the processes that the watchdog named as the cause, and after how many seconds; None without a verdict.
      struck: number of the process, where the job had fewer than planned.
    """

    strike: Strike
    lost: Lost
    verdict: tuple[tuple[int, ...], float] | None = None
    struck: int | None = None

    @property
    def named(self) -> bool:
        """Whether the verdict names the process that was struck, and no other."""
        struck = self.strike.process if self.struck is None else self.struck
        return self.verdict is not None and self.verdict[0] == (struck,)


def plan(
    seed: int,
    *,
    num_processes: int,
    num_steps: int,
    kills: int,
    stops: int = 0,
    starves: int = 0,
    joins: int = 0,
    leaves: int = 0,
) -> list[Strike]:
    """Return the strikes in the order of their steps; every process is struck in turn, including process 0.

    Args:
      seed: the plan is a pure function of it and of the other arguments.
      num_processes: of the job.
      num_steps: of the undisturbed run.
      kills: how many processes are killed.
      stops: how many are stopped.
      starves: how many are starved of disk.
      joins: how often processes join.
      leaves: how often processes leave.

    Raises:
      UserError: joins and leaves differ too much, see `chaos_changes.sizes`.
    """
    source = random.Random(seed)
    counts: dict[Kind, int] = {"kill": kills, "stop": stops, "starve": starves}
    if joins or leaves:
        counts |= {"join": joins, "leave": leaves}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    source.shuffle(kinds)
    # No strike in the last tenth of the steps, so that even the last one comes before the end.
    steps = sorted(source.choices(range(1, max(2, num_steps * 9 // 10)), k=len(kinds)))
    order = [process for _ in kinds for process in source.sample(range(num_processes), num_processes)]
    changes = iter(chaos_changes.sizes([kind for kind in kinds if kind in ("join", "leave")], num_processes))
    found = []
    for kind, process, step in zip(kinds, order, steps):
        if kind in ("join", "leave"):
            kind, count = next(changes)
            found.append(Strike(kind, process, step, num_processes=count))
            continue
        early = source.uniform(0.0, _EARLY_SECONDS) if kind == "kill" and source.random() < _EARLY_SHARE else None
        found.append(Strike(kind, process, step, early))
    return found


class Striker:
    """The thread that delivers the strikes of a plan to the job in a run directory, one after the other.

    Args:
      run_dir: of the job.
      strikes: in order; the next is due once the job has recovered from the one before.
      commands: change the number of processes.

    Attributes:
      hits: the strikes on single processes that the job recovered from.
      changed: the changes of the number of processes that the job made.
    """

    def __init__(self, run_dir: pathlib.Path, strikes: Sequence[Strike], commands: chaos_changes.Commands):
        self.hits: list[Hit] = []
        self.changed: list[Strike] = []
        self._commands = commands
        self._run_dir, self._strikes = run_dir, strikes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxdist-chaos", daemon=True)

    def __enter__(self) -> "Striker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        for strike in self._strikes:
            attempt = self._await_moment(strike)
            if attempt is None:
                return
            if strike.num_processes is not None:
                self._change(strike, len(attempt["process_ids"]))
                continue
            before = _highest_step(attempt)
            if not _deliver(strike, attempt["process_ids"][_struck(strike, attempt)]):
                continue
            struck = time.monotonic()
            verdict = self._await_end(struck, attempt)
            lost = self._await_recovery(struck, attempt["attempt"], before)
            if lost is None:
                return
            self.hits.append(Hit(strike, lost, verdict, _struck(strike, attempt)))

    def _await_moment(self, strike: Strike) -> dict[str, Any] | None:
        """Return the attempt that runs when the strike is due, None if the job ends before."""
        while not self._over.wait(_POLL_SECONDS):
            attempt = self._attempt()
            if attempt is None:
                continue
            report = board.read(pathlib.Path(attempt["memory"]), _struck(strike, attempt))
            if strike.early_seconds is not None:
                if time.monotonic() - attempt["monotonic"] >= strike.early_seconds:
                    return attempt
            elif report is not None and report.step >= strike.step:
                return attempt
        return None

    def _change(self, strike: Strike, num_processes: int) -> None:
        """Have processes join or leave, and wait until the job makes steps on the new number, or ends."""
        assert strike.num_processes is not None
        self._commands.change(abs(strike.num_processes - num_processes), joins=strike.kind == "join")
        while not self._over.wait(_POLL_SECONDS):
            changes = restart_events.changes(restart_events.read_events(self._run_dir))
            newest = changes[-1] if changes else {}
            if newest.get("processes") == strike.num_processes and newest["seconds_lost"] is not None:
                self.changed.append(strike)
                return

    def _await_end(self, struck: float, attempt: dict[str, Any]) -> tuple[tuple[int, ...], float] | None:
        """Return the verdict of the watchdog, None if the attempt ends without one."""
        while not self._over.wait(_POLL_SECONDS):
            published = board.published(pathlib.Path(attempt["memory"]))
            if published is not None:
                return tuple(published["culprits"]), time.monotonic() - struck
            if self._attempt() != attempt:
                return None
        return None

    def _await_recovery(self, struck: float, attempt: int, before: int) -> Lost | None:
        """Return what it took until a later attempt made a step beyond `before`; None if the job ends before."""
        passed: list[float] = []
        while not self._over.wait(_POLL_SECONDS):
            running = self._attempt()
            if running is None or running["attempt"] == attempt:
                continue
            if not passed or passed[0] != running["monotonic"]:
                passed = [running["monotonic"]]
            now, reports = time.monotonic(), _reports(running)
            stage = _stage(reports, before)
            passed += [now] * (stage + 1 - len(passed))
            if stage == _NUM_STAGES:
                return Lost(**dict(zip(_STAGES, map(float.__sub__, passed, [struck, *passed]))))
        return None

    def _attempt(self) -> dict[str, Any] | None:
        """Return the start event of the attempt that is running, None between two."""
        events = [event for event in restart_events.read_events(self._run_dir) if event["event"] in ("start", "end")]
        return events[-1] if events and events[-1]["event"] == "start" else None


def _struck(strike: Strike, attempt: dict[str, Any]) -> int:
    return strike.process % len(attempt["process_ids"])


def _reports(attempt: dict[str, Any]) -> list[board.ProcessReport | None]:
    return [board.read(pathlib.Path(attempt["memory"]), number) for number in range(len(attempt["process_ids"]))]


def _highest_step(attempt: dict[str, Any]) -> int:
    return max((report.step for report in _reports(attempt) if report is not None), default=0)


def _stage(reports: Sequence[board.ProcessReport | None], before: int) -> int:
    """Return how many of the stages after the first an attempt has completed; see Lost."""
    if any(report is None for report in reports):
        return 0
    if any(report.step > before for report in reports if report):
        return 3
    return 1 if any(report.phase == "restart" for report in reports if report) else 2


def _deliver(strike: Strike, process_id: int) -> bool:
    """Deliver a strike; return False if the process had ended by itself."""
    try:
        if strike.kind == "starve":
            # As on a full disk, every write fails; a file that is mapped or was written stays as it is.
            _, hard = resource.prlimit(process_id, resource.RLIMIT_FSIZE)
            resource.prlimit(process_id, resource.RLIMIT_FSIZE, (0, hard))
        else:
            os.kill(process_id, signal.SIGKILL if strike.kind == "kill" else signal.SIGSTOP)
    except ProcessLookupError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class ChaosResult:
    """The result of a chaos run.

    Attributes:
      planned: number of strikes planned.
      hits: those delivered to single processes and recovered from.
      changes: restarts, joins and leaves as the run record has them.
      restarts: attempts after the first.
      undisturbed: params_sha256 and steps of the undisturbed run.
      disturbed: the same of the run with faults.
      ledger: "exact", or what is wrong with the ledger.
    """

    planned: int
    hits: Sequence[Hit]
    restarts: int
    undisturbed: tuple[str | None, int]
    disturbed: tuple[str | None, int]
    ledger: str
    changes: Sequence[Mapping[str, Any]] = ()

    @property
    def identical(self) -> bool:
        """Whether both runs made the same params in the same number of steps, from the same examples."""
        return self.undisturbed == self.disturbed and self.undisturbed[0] is not None and self.ledger == "exact"

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        stops = [hit for hit in self.hits if hit.strike.kind == "stop"]
        return {
            "identical": self.identical,
            "params_sha256": {"undisturbed": self.undisturbed[0], "disturbed": self.disturbed[0]},
            "steps": {"undisturbed": self.undisturbed[1], "disturbed": self.disturbed[1]},
            "ledger": self.ledger,
            "planned": self.planned,
            "strikes": {kind: sum(h.strike.kind == kind for h in self.hits) for kind in ("kill", "stop", "starve")},
            "restarts": self.restarts,
            "changes": {kind: self._change_costs(kind) for kind in ("join", "leave")},
            "verdicts": {"right": sum(hit.named for hit in stops), "of": len(stops)},
            "verdict_seconds": _summary([hit.verdict[1] for hit in stops if hit.verdict]),
            "lost_seconds": _summary([hit.lost.total for hit in self.hits]),
            "split_seconds": {stage: _summary([getattr(hit.lost, stage) for hit in self.hits]) for stage in _STAGES},
        }

    def _change_costs(self, kind: str) -> dict[str, float]:
        costs = [change["seconds_lost"] for change in self.changes if change["kind"] == kind]
        return {"count": len(costs)} | _summary([seconds for seconds in costs if seconds is not None])

    def _changes_line(self) -> list[str]:
        costs = {kind: self._change_costs(kind) for kind in ("join", "leave")}
        if not any(cost["count"] for cost in costs.values()):
            return []
        parts = [
            f"{cost['count']} x {kind} (p50 {cost['p50']:.1f}, max {cost['max']:.1f} s lost)"
            for kind, cost in costs.items()
        ]
        numbers = " ".join(str(change["processes"]) for change in self.changes if change["kind"] != "restart")
        return [f"changes     {', '.join(parts)}", f"processes   {numbers}"]

    def __str__(self) -> str:
        content = self.to_json()
        strikes, lost, split = content["strikes"], content["lost_seconds"], content["split_seconds"]
        right, after = content["verdicts"], content["verdict_seconds"]
        stages = ", ".join(f"{stage} {seconds['p50']:.1f}" for stage, seconds in split.items())
        lines = [
            f"strikes     {strikes['kill']} kills, {strikes['stop']} stops, {strikes['starve']} starved of disk "
            f"({len(self.hits)} of {self.planned} planned)",
            *self._changes_line(),
            f"restarts    {self.restarts}",
            f"seconds     p50 {lost['p50']:.1f}, max {lost['max']:.1f} from a strike to the next new step",
            f"of these    p50 {stages}",
            f"verdicts    {right['right']} of {right['of']} stopped processes named, after p50 {after['p50']:.1f}, "
            f"max {after['max']:.1f} s",
            f"steps       {self.undisturbed[1]} undisturbed, {self.disturbed[1]} disturbed",
            f"params      {self.undisturbed[0]} undisturbed",
            f"            {self.disturbed[0]} disturbed",
            f"examples    {self.ledger}",
            "identical" if self.identical else "NOT identical",
        ]
        return "\n".join(lines)


def run(
    command: Sequence[str],
    directory: pathlib.Path,
    *,
    seed: int,
    num_processes: int,
    num_examples: int,
    kills: int,
    stops: int = 0,
    starves: int = 0,
    joins: int = 0,
    leaves: int = 0,
) -> ChaosResult:
    """Run `command` (with `--run-dir` added) undisturbed and with faults; return the report.

    Args:
      command: trains in supervised processes and records the ledger.
      directory: gets the two run directories, `undisturbed` and `disturbed`.
      seed: seed of the plan.
      num_processes: that the command starts.
      num_examples: of an epoch, for the ledger.
      kills: see `plan`.
      stops: see `plan`.
      starves: see `plan`.
      joins: see `plan`.
      leaves: see `plan`.

    Raises:
      UserError: joins and leaves differ too much.
      RuntimeError: the undisturbed run failed.
    """
    calm_dir, struck_dir = directory / "undisturbed", directory / "disturbed"
    counts = {"kills": kills, "stops": stops, "starves": starves, "joins": joins, "leaves": leaves}
    plan(seed, num_processes=num_processes, num_steps=1, **counts)  # which refuses an impossible one now
    status = _train(command, calm_dir)
    if status:
        raise RuntimeError(f"The undisturbed run ended with status {status}; its logs are in {calm_dir / 'logs'}.")
    undisturbed = record.RunRecord.read(calm_dir)
    strikes = plan(seed, num_processes=num_processes, num_steps=undisturbed.step, **counts)
    with chaos_changes.Commands(struck_dir, seed) as commands, Striker(struck_dir, strikes, commands) as striker:
        _train(command, struck_dir)
    disturbed = record.RunRecord.read(struck_dir)
    return ChaosResult(
        planned=sum(strike.num_processes is None for strike in strikes),
        hits=striker.hits,
        restarts=sum(event["event"] == "start" for event in restart_events.read_events(struck_dir)) - 1,
        undisturbed=(undisturbed.params_sha256, undisturbed.step),
        disturbed=(disturbed.params_sha256, disturbed.step),
        ledger=compare_ledgers(calm_dir, struck_dir, num_examples=num_examples),
        changes=restart_events.changes(restart_events.read_events(struck_dir)),
    )


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


def _train(command: Sequence[str], run_dir: pathlib.Path) -> int:
    run_dir.mkdir(parents=True)
    with (
        open(run_dir / "output.txt", "wb") as output,
        subprocess.Popen([*command, "--run-dir", str(run_dir)], stdout=output, stderr=subprocess.STDOUT) as job,
    ):
        try:
            return job.wait()
        finally:
            job.terminate()  # if an exception such as Ctrl-C ends this process, the job ends too


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    return {"p50": statistics.median(seconds), "max": max(seconds)} if seconds else {"p50": 0.0, "max": 0.0}

"""The process that watches a parameter-server run: it evaluates, saves, decides the end and keeps the record.

It holds what the user's experiment says about all that, and nothing of the protocol, so any of the processes it looks
at may die at any moment. It learns of steps and of cuts (all params between two steps) from files that the scheduler's
process writes, and answers each cut with a verdict: go on, or end.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from jaxdist import stop
from jaxdist.checkpoint import checkpoints
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.processes.crew import Crew
from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.protocol.settings import SCHEDULER
from jaxdist.paramserver.run import judge, shared_plan
from jaxdist.paramserver.run.resume import BEYOND, Start, remove_snapshots
from jaxdist.paramserver.wire import encoding
from jaxdist.run import attempt, components, progress_display, stopwatch
from jaxdist.rundir import record, writers
from jaxdist.spmd.state import TrainState

POLL_SECONDS = 0.05
REPEAT_SECONDS = 1.0
"""How often an answer is given again until it shows that it was heard."""
NONFINITE = "nonfinite"
KEPT_SNAPSHOTS = 2
"""The newest may not be in force yet; the one before it is."""

Send = Callable[[str, messages.Message], None]


class Observer:
    """One attempt at a run: what was heard of it, and what is written about it.

    Args:
      plan: the experiment, put together.
      run_dir: where the record, the metrics and the checkpoints go; `ps/` in it is the processes' own.
      start: where the run begins.
      earlier: the record of the run that is resumed.
      checkpointer: of the run directory.
      silent: show nothing.
      command: for the record.
      num_devices: of each worker.
    """

    def __init__(
        self,
        plan: shared_plan.Plan,
        run_dir: pathlib.Path,
        start: Start,
        earlier: record.RunRecord | None,
        checkpointer: checkpoints.Checkpointer,
        *,
        identity: components.Identity,
        silent: bool,
        command: str,
        num_devices: int,
    ) -> None:
        self.plan, self.run_dir, self.start, self.earlier = plan, run_dir, start, earlier
        self.directory = run_dir / run_folder.DIRECTORY_NAME
        self.checkpointer, self.silent, self.command, self.num_devices = checkpointer, silent, command, num_devices
        self.identity = dataclasses.asdict(identity)
        self.rule = plan.experiment.stop.rule()
        self.judge = judge.Judge(plan)
        self.progress = start.progress
        self.stopwatch = stopwatch.Stopwatch(earlier.time_seconds if earlier else None)
        self.step_times = stopwatch.StepTimes()
        self.last_time: float | None = None
        self.seen_cut = 0  # when the file of the newest cut was written
        self.cut_step = start.progress.step
        self.judged: messages.Verdict | None = None
        self.state = start.state
        self.saved = start.progress.step if start.state is not None else -1
        self.restarts = 0
        self.end_reason: str | None = None
        self.halt = ""
        self.writers = writers.make_writers(
            run_dir, plan.experiment.writers, resumed_step=start.progress.step if earlier else None
        )

    def run(self, crew: Crew, send: Send, stop_requested: Callable[[], bool]) -> record.RunRecord:
        """Watch until the run ends; return the record, which is written too."""
        self.end_reason = self.rule(self.progress) if self.progress.step else None
        with self._display() as display:
            try:
                if self.end_reason is None:
                    with contextlib.ExitStack() as self.phase:
                        self._charge("compile")
                        self._watch(crew, send, stop_requested, display)
                self.checkpointer.wait()
                if self.end_reason == NONFINITE:
                    self._report_nonfinite()
            except BaseException:
                self.write_record("error")
                raise
            finally:
                for writer in self.writers:
                    writer.close()
            made = self.write_record(self.end_reason, final=True)
            display.finish(attempt.summary(made, self.run_dir, self.checkpointer))
        return made

    def _watch(self, crew: Crew, send: Send, stop_requested: Callable[[], bool], display: Any) -> None:
        started, before = time.monotonic(), self.progress.seconds
        repeat_at = 0.0
        crew.start()
        with (self.directory / run_folder.STEPS_NAME).open("a+") as steps:
            while self.end_reason is None:
                crew.look_after()
                self.restarts = crew.restarts
                if self._read_steps(steps):
                    if self.stopwatch.phase == "compile":
                        self._charge("compute")
                    crew.progressed()
                    display.update(self.progress.step, self.progress.metrics)
                self.progress.seconds = before + time.monotonic() - started
                self._judge_cut(steps, send)
                self._maybe_halt(stop_requested)
                if time.monotonic() >= repeat_at:
                    repeat_at = time.monotonic() + REPEAT_SECONDS
                    self._repeat(send)
                    remove_snapshots(self.directory, keep=KEPT_SNAPSHOTS)
                time.sleep(POLL_SECONDS)

    def _charge(self, account: str) -> None:
        """Charge the time from now on to `account`: what passes before the first step is no training."""
        self.phase.close()
        self.phase.enter_context(self.stopwatch.account(account))

    def _repeat(self, send: Send) -> None:
        """Say again what may not have been heard: messages are lost, and a scheduler that is back asks anew."""
        if self.judged is not None:
            send(SCHEDULER, self.judged)
        if self.halt:
            send(SCHEDULER, messages.Halt(self.halt))

    def _display(self) -> Any:
        limits = self.plan.experiment.stop
        bounds = progress_display.Bounds(
            max_steps=limits.max_steps,
            max_epochs=limits.max_epochs,
            max_seconds=limits.max_seconds,
            steps_per_epoch=self.plan.settings.steps_per_epoch,
        )
        return progress_display.make_progress(
            bounds,
            global_batch_size=self.plan.experiment.global_batch_size,
            start_step=self.progress.step,
            carried_seconds=self.progress.seconds,
            silent=self.silent,
        )

    # Steps.

    def _read_steps(self, steps: Any) -> bool:
        """Take in the steps that were written since; return whether any was."""
        before = self.progress.step
        while True:
            at = steps.tell()
            line = steps.readline()
            if not line.endswith("\n"):
                steps.seek(at)
                return self.progress.step != before
            self._take_step(json.loads(line))

    def _take_step(self, row: dict[str, Any]) -> None:
        step = row["step"]
        named = {f"train/{name}": value for name, value in row["metrics"].items()}
        if self.last_time is not None:
            self.step_times.add(max(row["time"] - self.last_time, 0.0))
        self.last_time = row["time"]
        # A return to a snapshot counts steps again; files of metrics hold each once.
        if step <= self.progress.step:
            return
        self.judged = None
        self.progress.step = step
        self.progress.examples_seen += row["examples"]
        self.progress.epoch = step // self.plan.settings.steps_per_epoch
        self.progress.metrics.update(named)
        if step == 1 or step % self.plan.experiment.log_every == 0:
            if self.plan.learning_rate is not None:
                named["train/learning_rate"] = self.plan.learning_rate(step)
                self.progress.metrics.update(named)
            self._write_metrics(step, named)

    def _write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        for writer in self.writers:
            writer.write(step, metrics)

    # Cuts.

    def _judge_cut(self, steps: Any, send: Send) -> None:
        path = self.directory / run_folder.CUT_NAME
        written = path.stat().st_mtime_ns if path.exists() else 0
        if written == self.seen_cut:
            return
        self.seen_cut = written
        cut = encoding.decode(path.read_bytes())
        assert isinstance(cut, journal.Cut)
        self._read_steps(steps)  # those up to the cut were written before it
        self.progress.step = max(self.progress.step, cut.step)
        self.state = self.judge.state(cut)
        self._evaluate(cut, self.state)
        reason = NONFINITE if self._diverged(cut) else self.rule(self.progress) or self.halt or cut.end_reason
        self._save(cut, self.state, reason)
        self.cut_step = cut.step
        self.judged = messages.Verdict(cut.step, reason)
        send(SCHEDULER, self.judged)
        self.end_reason = reason or None
        self.write_record(None)

    def _due(self, cut: journal.Cut, period: int) -> bool:
        return bool(cut.end_reason) or cut.step // period > self.cut_step // period

    def _evaluate(self, cut: journal.Cut, state: TrainState) -> None:
        """Evaluate if that is due; a run that is stopped has no time for it, and one that diverged no use."""
        period = shared_plan.evaluation_period(self.plan)
        done = self.progress.last_evaluation == cut.step > 0
        if period is None or done or self.halt == "preempted" or not self._due(cut, period) or self._diverged(cut):
            return
        with self.stopwatch.account("eval"):
            found = self.judge.evaluate(state)
        self.progress.record_evaluation(found)
        self._write_metrics(cut.step, found)

    def _diverged(self, cut: journal.Cut) -> bool:
        """Return True where a gradient was not finite, or the loss is not."""
        return cut.end_reason == NONFINITE or stop.nonfinite()(self.progress) is not None

    def _report_nonfinite(self) -> None:
        """Gather what the workers found out about it."""
        found = sorted((self.directory / run_folder.NONFINITE_NAME).glob("*.txt"))
        attempt.write_nonfinite(self.run_dir, "\n".join(path.read_text() for path in found), self.checkpointer)

    def _save(self, cut: journal.Cut, state: TrainState, reason: str) -> None:
        """Save if that is due, and at every end but that of a run that diverged."""
        every = self.plan.experiment.checkpoints.every_steps
        if self.saved == cut.step or self._diverged(cut) or not (reason or self._due(cut, every)):
            return
        self.saved = cut.step
        place = shared_plan.position(self.plan, cut.trained.step)
        data_state: dict[str, Any] = {"position": place.to_json(), "progress": self.progress.to_json()}
        if cut.trained.beyond:
            data_state[BEYOND] = list(cut.trained.beyond)
        with self.stopwatch.account("checkpoint"):
            self.checkpointer.save(cut.step, state, data_state, self.progress.metrics)

    def _maybe_halt(self, stop_requested: Callable[[], bool]) -> None:
        limit = self.plan.experiment.stop.max_seconds
        if not self.halt and stop_requested():
            self.halt = "preempted"
        elif not self.halt and limit is not None and self.progress.seconds >= limit:
            self.halt = "max_seconds"

    # The record.

    def statistics(self) -> dict[str, Any]:
        """Return the `ps` entry of run.json: what all processes counted, dead ones included."""
        counters: Counter[str] = Counter()
        staleness: Counter[int] = Counter()
        for path in (self.directory / run_folder.STATISTICS_NAME).glob("*.json"):
            with contextlib.suppress(json.JSONDecodeError):
                content = json.loads(path.read_text())
                counters.update(content["counters"])
                staleness.update({int(key): count for key, count in content["staleness"].items()})
        names = ("updates", "duplicates_refused", "fenced", "torn_pushes", "failovers", "rollbacks", "refused")
        return {name: counters[name] for name in names} | {"staleness": dict(sorted(staleness.items()))}

    def write_record(self, end_reason: str | None, *, final: bool = False) -> record.RunRecord:
        """Write run.json; the hash of the params is taken at the end only."""
        settings, seconds = self.plan.settings, self.stopwatch.seconds()
        servers = settings.servers * (2 if settings.replicated else 1)
        made = record.RunRecord(
            end_reason=end_reason,
            step=self.progress.step,
            examples_seen=self.progress.examples_seen,
            params_sha256=record.params_sha256(self.state.params) if final and self.state is not None else None,
            metrics=self.progress.metrics,
            strategy="parameter-server",
            reduction=self.plan.experiment.reduction,
            num_devices=settings.workers * self.num_devices,
            num_processes=1 + servers + settings.workers,
            examples_per_second=self.progress.examples_seen / seconds["compute"] if seconds["compute"] else None,
            step_seconds=self.step_times.summary(),
            time_seconds=seconds,
            compile_count=0,
            restarts=self.restarts + (self.earlier.restarts + 1 if self.earlier else 0),
            config=self.plan.experiment,
            versions=record.versions(),
            command=self.command,
            extra={"identity": self.identity, "ps": self.statistics()},
        )
        made.write(self.run_dir)
        return made

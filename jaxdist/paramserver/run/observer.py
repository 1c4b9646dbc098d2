"""The observer of a parameter-server run: it evaluates, saves, decides when the run ends, and writes the record.

It knows the experiment but takes no part in the protocol, so the processes that it watches may die at any time. It
reads steps and cuts (all params between two steps) from files that the scheduler writes, and answers each cut with a
verdict: continue, or end the run.
"""

import contextlib
import functools
import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxdist import stop
from jaxdist.checkpoint import checkpoints
from jaxdist.config import hook_points
from jaxdist.errors import RunFailedError
from jaxdist.launch.supervising import restart_events
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.processes.crew import Crew
from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.protocol.settings import SCHEDULER
from jaxdist.paramserver.run import judge, room, shared_plan, worker_changes
from jaxdist.paramserver.run.resume import BEYOND, Start, examples_seen, remove_saved_cuts
from jaxdist.paramserver.wire import encoding
from jaxdist.run import bookkeeping, components, disk_room, header, stopwatch
from jaxdist.run.custom import user_hooks
from jaxdist.run.use.reporting import server_timeline
from jaxdist.rundir import files, full_disk, record
from jaxdist.spmd.state import TrainState

POLL_SECONDS = 0.05
REPEAT_SECONDS = 1.0
"""Time between two sends of the same answer, until the run shows that it arrived."""
DRAW_SECONDS = 10.0
"""Time between two pictures of the run; the last one is drawn at its end."""
NONFINITE = "nonfinite"
KEPT_CUTS = 2
"""Saved cuts that stay: the scheduler may not know of the newest one yet, but knows of the one before it."""

Send = Callable[[str, messages.Message], None]


class Observer:
    """Watches one attempt at a run.

    Args:
      plan: the Plan of the experiment.
      run_dir: the run directory; the folder `ps` in it belongs to the processes.
      start: the state that the run starts from.
      earlier: the record of the run that is resumed; None for a new run.
      checkpointer: saves checkpoints in the run directory.
      identity: identity of the experiment.
      silent: whether to show nothing.
      command: the command line, for the run record.
      num_devices: number of devices of each worker.
      source: the file of the experiment and its overrides.
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
        source: bookkeeping.ExperimentSource,
    ) -> None:
        self.plan, self.directory = plan, run_dir / run_folder.DIRECTORY_NAME
        self.began_with, self.silent = start.began_with, silent
        self.rule = plan.experiment.stop.rule()
        self.judge = judge.Judge(plan)
        settings = plan.settings
        servers = settings.servers * (2 if settings.replicated else 1)
        self.books = bookkeeping.Bookkeeper(
            bookkeeping.Facts(
                experiment=plan.experiment,
                identity=identity,
                run_dir=run_dir,
                strategy="parameter-server",
                num_devices=settings.workers * num_devices,
                num_processes=1 + servers + settings.workers,
                fields=components.example_batch(plan.loader),
                steps_per_epoch=settings.steps_per_epoch,
                learning_rate=plan.learning_rate,
                command=command,
                silent=silent,
                earlier=earlier,
                source=source,
                began_with=start.began_with,
                header=functools.partial(self._header, run_dir, num_devices),
            ),
            checkpointer,
            start.progress,
            stopwatch.Stopwatch(earlier.time_seconds if earlier else None),
            evaluate=None if plan.experiment.data.eval is None else self.judge.evaluate,
            extra=lambda: {"ps": self.statistics()},
        )
        self.progress = start.progress
        self.changes = worker_changes.WorkerChanges(
            earlier.extra.get("changes", []) if earlier else [],
            num_workers=settings.workers,
            num_others=1 + servers,
        )
        self.books.worker_changes = self.changes.rows
        self.last_time: float | None = None
        self.started, self.clock_offset = time.monotonic(), 0.0
        """What turns the scheduler's clock into seconds of training."""
        self.seen_cut = 0  # when the file of the newest cut was written
        self.judged: messages.Verdict | None = None
        self.state = start.state
        self.unlogged: tuple[int, dict[str, float], dict[str, float]] = (0, {}, {})
        self.end_reason: str | None = None
        self.halt = ""
        self.mistake: user_hooks.HookError | None = None
        self.identity, self.room = identity, room.RoomWatch(run_dir, self.directory)

    def _header(self, run_dir: pathlib.Path, num_devices: int) -> str:
        plan, settings = self.plan, self.plan.settings
        workers, servers = header.count(settings.workers, "worker"), header.count(settings.servers, "server")
        roles = f"{workers} of {header.count(num_devices, 'device')}, {servers}"
        shapes = zip(plan.sharding.shapes, plan.sharding.dtypes)
        return header.render(
            plan.experiment,
            params=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes],
            devices=f"{roles}, {settings.mode}",
            share=f"in {settings.num_slices} slices" if settings.num_slices > 1 else "each by one worker",
            steps_per_epoch=settings.steps_per_epoch,
            run_dir=run_dir,
            step=self.progress.step,
            began_with=self.began_with,
        )

    def run(self, crew: Crew, send: Send, stop_requested: Callable[[], bool]) -> record.RunRecord:
        """Watch until the run ends; write and return the run record."""
        self.end_reason = self.rule(self.progress) if self.progress.step else None
        with self.books.shown():
            try:
                if self.end_reason is None:
                    self.books.call_hooks("on_start", self.state or user_hooks.NO_STATE)
                    with contextlib.ExitStack() as self.phase:
                        self._charge("compile")
                        self._watch(crew, send, stop_requested)
                if self.mistake is not None and self.end_reason != NONFINITE:
                    restart_events.say(bookkeeping.saved_at_mistake(self.progress.step))
                    raise self.mistake
                if self.end_reason == NONFINITE:
                    self._report_nonfinite()
                self._draw()
                made = self.books.finish(str(self.end_reason), self.state.params if self.state else None)
                self.books.call_hooks("on_end", self.state or user_hooks.NO_STATE, end_reason=str(self.end_reason))
                return made
            except BaseException as error:
                with contextlib.suppress(OSError):  # on a full disk: the user is told what happened first
                    self.books.write_record("error")
                    self._draw()
                if full_disk.is_full(error):
                    raise RunFailedError(str(error)) from error
                raise

    def _watch(self, crew: Crew, send: Send, stop_requested: Callable[[], bool]) -> None:
        self.started = time.monotonic() - self.progress.seconds
        self.clock_offset = self.progress.seconds - time.time()
        repeat_at, draw_at = 0.0, time.monotonic() + DRAW_SECONDS
        crew.start()
        with (self.directory / run_folder.STEPS_NAME).open("a+") as steps:
            steps.seek(0)  # "a+" begins at the end, and the scheduler may have been quick
            while self.end_reason is None:
                for name, boot in crew.look_after().items():
                    send(SCHEDULER, messages.Died(name, boot))
                self.books.process_restarts = crew.restarts
                if self._read_steps(steps):
                    if self.books.stopwatch.phase == "compile":
                        self._charge("compute")
                    crew.progressed()
                    self.books.display.update(self.progress.step, self.progress.metrics, epoch=self.progress.epoch)
                self.progress.seconds = time.monotonic() - self.started
                self._judge_cut(steps, send)
                self._maybe_halt(stop_requested)
                if time.monotonic() >= repeat_at:
                    repeat_at = time.monotonic() + REPEAT_SECONDS
                    self.room.look(is_stopping=bool(self.halt))
                    self._repeat(send)
                    remove_saved_cuts(self.directory, keep=KEPT_CUTS)
                if time.monotonic() >= draw_at:
                    draw_at = time.monotonic() + DRAW_SECONDS
                    self._draw()
                time.sleep(POLL_SECONDS)

    def _charge(self, account: str) -> None:
        """Charge the time from now on to `account`: the time before the first step is not training time."""
        self.phase.close()
        self.phase.enter_context(self.books.stopwatch.account(account))

    def _repeat(self, send: Send) -> None:
        """Repeat what may not have arrived: messages are lost, and a restarted scheduler asks again."""
        if self.judged is not None:
            send(SCHEDULER, self.judged)
        if self.halt:
            send(SCHEDULER, messages.Halt(self.halt))

    # Steps.

    def _read_steps(self, steps: Any) -> bool:
        """Read the steps written since the last call; return whether there were any."""
        before = self.progress.step
        while True:
            at = steps.tell()
            line = steps.readline()
            if not line.endswith("\n"):
                steps.seek(at)
                return self.progress.step != before
            self._take_step(json.loads(line))

    def _take_step(self, row: dict[str, Any]) -> None:
        if "workers" in row:
            members = {int(worker): incarnation for worker, incarnation in row["workers"].items()}
            for text in self.changes.note_members(members, self.progress.step, row["time"]):
                if not self.silent:
                    restart_events.say(text)
            return
        step = row["step"]
        if "grad_norm" in row:
            if step == self.unlogged[0]:
                self.unlogged[1]["grad_norm"] = row["grad_norm"]
                self.progress.metrics["train/grad_norm"] = row["grad_norm"]
            return
        self._log()
        if self.last_time is not None:
            self.books.step_times.add(max(row["time"] - self.last_time, 0.0))
        self.last_time = row["time"]
        self.changes.note_step(row["time"])
        # After a rollback, steps are committed again; the metrics files contain each step once.
        if step <= self.progress.step:
            return
        self.judged = None
        # The row is read late, and its clock may be wrong or set: not before the last row, nor after now.
        now = min(row["time"] + self.clock_offset, time.monotonic() - self.started)
        self.progress.seconds = max(self.progress.seconds, now)
        self.progress.advance(step, self.progress.examples_seen + row["examples"], self.plan.settings.num_examples)
        self.progress.metrics.update({f"train/{name}": value for name, value in row["metrics"].items()})
        if row.get("empty"):
            self.progress.count_empty(1)
        named = {f"train/{name}": value for name, value in row["metrics"].items()}
        if self.mistake is None:
            with self._saved_at_mistakes():
                self.books.call_hooks(hook_points.ON_STEP, user_hooks.NO_STATE, lambda: named)
        self.unlogged = (step, row["metrics"], bookkeeping.stamp(self.progress))

    def _log(self) -> None:
        """Write the metrics of the last step, once the line with its gradient norm has been read."""
        (step, found, stamped), self.unlogged = self.unlogged, (0, {}, {})
        if step and self.books.logs(step):
            self.books.log(step, found, stamped)

    # Cuts.

    def _judge_cut(self, steps: Any, send: Send) -> None:
        path = self.directory / run_folder.CUT_NAME
        written = path.stat().st_mtime_ns if path.exists() else 0
        if written == self.seen_cut:
            return
        self.seen_cut = written
        cut = encoding.decode(path.read_bytes())
        assert isinstance(cut, journal.Cut)
        self._read_steps(steps)  # the steps up to the cut were written before it
        self._log()
        if self.progress.step <= cut.step:
            # A cut says exactly which batches were trained; between cuts, the examples of each step are added up.
            self.progress.advance(cut.step, examples_seen(self.plan, cut.trained), self.plan.settings.num_examples)
        self.state = self.judge.state(cut)
        self._evaluate(cut, self.state)
        reason = NONFINITE if self._diverged(cut) else self.rule(self.progress) or self.halt or cut.end_reason
        self._save(cut, self.state, now=self.books.unsaved_best or bool(reason), is_last=bool(reason))
        self.judged = messages.Verdict(cut.step, reason)
        send(SCHEDULER, self.judged)
        self.end_reason = reason or None
        self.books.write_record(None)

    def _evaluate(self, cut: journal.Cut, state: TrainState) -> None:
        """Evaluate if due; a run that is preempted has no time for it, and one that diverged no use."""
        due = self.books.evaluations.due() or bool(cut.end_reason)
        if due and self.halt != "preempted" and not self._diverged(cut):
            with self._saved_at_mistakes():
                self.books.evaluate(state)

    @contextlib.contextmanager
    def _saved_at_mistakes(self) -> Iterator[None]:
        """End the run as a stop signal does if a hook raises an error, which is raised once the step is saved."""
        try:
            yield
        except user_hooks.HookError as error:
            self.mistake, self.halt = error, self.halt or "preempted"

    def _diverged(self, cut: journal.Cut) -> bool:
        """Return whether a gradient or the loss is not finite."""
        return cut.end_reason == NONFINITE or stop.nonfinite()(self.progress) is not None

    def _report_nonfinite(self) -> None:
        """Collect the reports of the workers on gradients that are not finite."""
        found = sorted((self.directory / run_folder.NONFINITE_NAME).glob("*.txt"))
        self.books.report_nonfinite("\n".join(path.read_text() for path in found))

    def _save(self, cut: journal.Cut, state: TrainState, *, now: bool, is_last: bool) -> None:
        """Save if due, if `now`, and at the end of the run; a run that diverged saves nothing, nor does a full disk."""
        due = self.books.saves.due() or bool(cut.end_reason) or now
        if not due or self._diverged(cut):
            return
        place = shared_plan.position(self.plan, cut.trained.step)
        beyond = {BEYOND: list(cut.trained.beyond)} if cut.trained.beyond else {}
        try:
            self.books.save(state, place, **beyond)
            if is_last:
                self.books.checkpointer.wait()
        except checkpoints.CheckpointError as error:
            if not disk_room.is_no_room(error):
                raise
            self.room.note_save(fitted=False)
            if is_last:
                self._keep_in_memory(state, {"position": place.to_json(), **beyond})
        else:
            self.room.note_save(fitted=True)

    def _keep_in_memory(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Keep the last state in memory, since the disk is full.

        Raises:
          RunFailedError: always; the message says where the state is.
        """
        run_dir, step = self.directory.parent, self.progress.step
        data_state = {"progress": self.progress.to_json(), **data}
        kept = disk_room.keep_in_memory(run_dir, None, str(self.identity), step, state, data_state)
        raise disk_room.no_room(run_dir, step, kept)

    def _maybe_halt(self, stop_requested: Callable[[], bool]) -> None:
        limit = self.plan.experiment.stop.max_seconds
        if not self.halt and stop_requested():
            self.halt = "preempted"
        elif not self.halt and limit is not None and self.progress.seconds >= limit:
            self.halt = "max_seconds"

    # The record.

    def _draw(self) -> None:
        """Write the picture of the run so far, unless the disk is full: the next one shows the same."""
        run_dir = self.directory.parent
        picture = server_timeline.draw(server_timeline.read(run_dir))
        try:
            if picture:
                files.write_text(run_dir / server_timeline.FILE_NAME, picture)
        except OSError as error:
            if not full_disk.is_full(error):
                raise

    def statistics(self) -> dict[str, Any]:
        """Return the `ps` entry of run.json: the counters of all processes, including those that died."""
        counters: Counter[str] = Counter()
        staleness: Counter[int] = Counter()
        for path in (self.directory / run_folder.STATISTICS_NAME).glob("*.json"):
            with contextlib.suppress(json.JSONDecodeError):
                content = json.loads(path.read_text())
                counters.update(content["counters"])
                staleness.update({int(key): count for key, count in content["staleness"].items()})
        names = ("updates", "duplicates_refused", "fenced", "torn_pushes", "failovers", "rollbacks", "refused")
        return {name: counters[name] for name in names} | {"staleness": dict(sorted(staleness.items()))}

"""The observer of a parameter-server run: it evaluates, saves, decides when the run ends, and writes the record.

It knows the experiment and no protocol but that of its Reader, so the processes that it watches may die at any time.
The scheduler offers it cuts (all shards between two steps); it reads what it needs of one from the servers, and answers
with a verdict: continue, or end the run. Steps it reads from a file, a few words each: the scheduler has to keep them
until they are in the metrics files, and other programs read them, too.
"""

import contextlib
import functools
import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from jaxdist import stop
from jaxdist.checkpoint import checkpoints
from jaxdist.config import hook_points
from jaxdist.errors import RunFailedError, UserError, say
from jaxdist.paramserver.processes import process_world, run_folder
from jaxdist.paramserver.processes.crew import Crew
from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.reader import Reader
from jaxdist.paramserver.protocol.settings import SCHEDULER
from jaxdist.paramserver.run import judge, room, shared_plan, worker_changes
from jaxdist.paramserver.run.resume import BEYOND, Start, examples_seen, remove_saved_cuts
from jaxdist.run import bookkeeping, components, disk_room, header, stopwatch
from jaxdist.run.custom import user_hooks
from jaxdist.run.use.reporting import server_timeline
from jaxdist.rundir import files, full_disk, record
from jaxdist.spmd.state import TrainState
from jaxdist.spmd.step import GRAD_NORM

REPEAT_SECONDS = 1.0
"""Time between two sends of the same answer, until the run shows that it arrived."""
DRAW_SECONDS = 10.0
"""Time between two pictures of the run; the last one is drawn at its end."""
NONFINITE = "nonfinite"
KEPT_CUTS = 2
"""Saved cuts that stay: the scheduler may not know of the newest one yet, but knows of the one before it."""

WHOLE = (messages.PARAMS, messages.OPT_STATE)

Send = Callable[[str, messages.Message], None]


def facts_of(
    plan: shared_plan.Plan,
    run_dir: pathlib.Path,
    start: Start,
    earlier: record.RunRecord | None,
    *,
    identity: components.Identity,
    silent: bool,
    command: str,
    num_devices: int,
    source: bookkeeping.ExperimentSource,
) -> bookkeeping.Facts:
    """Return what is known of an attempt at its start; `num_devices` are those of each worker."""
    settings = plan.settings
    servers = settings.servers * (2 if settings.replicated else 1)
    return bookkeeping.Facts(
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
        header=functools.partial(_header, plan, run_dir, start, num_devices),
    )


def _header(plan: shared_plan.Plan, run_dir: pathlib.Path, start: Start, num_devices: int) -> str:
    settings = plan.settings
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
        step=start.progress.step,
        began_with=start.began_with,
    )


class Observer:
    """Watches one attempt at a run.

    Args:
      plan: the Plan of the experiment.
      start: the state that the run starts from.
      checkpointer: saves checkpoints in the run directory.
      attempt: see `facts_of`; the folder `ps` in its run directory belongs to the processes.
    """

    def __init__(
        self,
        plan: shared_plan.Plan,
        start: Start,
        checkpointer: checkpoints.Checkpointer,
        attempt: bookkeeping.Facts,
    ) -> None:
        self.plan, self.directory = plan, attempt.run_dir / run_folder.DIRECTORY_NAME
        self.silent = attempt.silent
        self.rule = plan.experiment.stop.rule()
        self.judge = judge.Judge(plan)
        self.counted_before = attempt.earlier.extra.get("ps", {}) if attempt.earlier else {}
        devices = attempt.num_devices // plan.settings.workers
        threads = shared_plan.threads_in_use(plan, devices)  # not of this process, which computes no gradient
        self.books = bookkeeping.Bookkeeper(
            attempt,
            checkpointer,
            start.progress,
            stopwatch.Stopwatch(attempt.earlier.time_seconds if attempt.earlier else None),
            evaluate=None if plan.experiment.data.eval is None else self.judge.evaluate,
            extra=lambda: {"ps": self.statistics(), "cpu_threads": threads},
        )
        self.progress = start.progress
        self.changes = worker_changes.WorkerChanges(
            attempt.earlier.extra.get("changes", []) if attempt.earlier else [],
            num_workers=plan.settings.workers,
            num_others=attempt.num_processes - plan.settings.workers,
        )
        self.books.worker_changes = self.changes.rows
        self.last_time: float | None = None
        self.started, self.clock_offset = time.monotonic(), 0.0
        """What turns the scheduler's clock into seconds of training."""
        self.world = process_world.ProcessWorld(self.directory)
        self.driver = Driver(Reader(plan.settings.timers.retry), self.world, observe=self._note)
        self.shown: effects.Offered | effects.CutRead | None = None  # what the reader shows, until it is looked at
        self.evaluation_due = self.save_due = False  # until the verdict on the cut at which they became due
        self.evaluated: tuple[int, ...] = ()  # the chains of the cut that was evaluated last
        self.state = start.state
        self.unlogged: tuple[int, dict[str, float], dict[str, float]] = (0, {}, {})
        self.end_reason: str | None = None
        self.halt = ""
        self.is_untouched = True  # no worker has joined, so nothing is trained
        self.mistake: UserError | None = None
        self.identity, self.room = attempt.identity, room.RoomWatch(attempt.run_dir, self.directory)

    def run(self, crew: Crew, wire: process_world.Sender, stop_requested: Callable[[], bool]) -> record.RunRecord:
        """Watch until the run ends; write and return the run record. `wire` delivers to `world`."""
        self.world.connect(wire)
        self.end_reason = self.rule(self.progress) if self.progress.step else None
        with self.books.shown():
            try:
                if self.end_reason is None:
                    self.books.call_hooks("on_start", self.state or user_hooks.NO_STATE)
                    with contextlib.ExitStack() as self.phase:
                        self._charge("compile")
                        self._watch(crew, wire.send, stop_requested)
                    crew.close(orderly=not self.is_untouched)  # the record has their last counters
                if self.mistake is not None and self.end_reason != NONFINITE:
                    say(bookkeeping.saved_at_mistake(self.progress.step))
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
        self._maybe_halt(stop_requested)
        if self.end_reason is None:
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
                self._show_step()
                self.progress.seconds = time.monotonic() - self.started
                self._look_at_cut(steps)
                self._maybe_halt(stop_requested)
                if time.monotonic() >= repeat_at:
                    repeat_at = time.monotonic() + REPEAT_SECONDS
                    self.room.look(is_stopping=bool(self.halt))
                    self._repeat(send)
                    remove_saved_cuts(self.directory, keep=KEPT_CUTS)
                if time.monotonic() >= draw_at:
                    draw_at = time.monotonic() + DRAW_SECONDS
                    self._draw()
                self.world.turn(self.driver)  # waits for a message, at most until the next tick

    def _charge(self, account: str) -> None:
        """Charge the time from now on to `account`: the time before the first step is not training time."""
        self.phase.close()
        self.phase.enter_context(self.books.stopwatch.account(account))

    def _repeat(self, send: Send) -> None:
        """Repeat what may not have arrived: messages are lost, and a restarted scheduler does not know."""
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

    def _show_step(self) -> None:
        """Show the last step, unless its gradient norm is still to come: that of another one would be shown with it."""
        if GRAD_NORM in self.unlogged[1]:
            self.books.display.update(self.progress.step, self.progress.metrics, epoch=self.progress.epoch)

    def _take_step(self, row: dict[str, Any]) -> None:
        self.is_untouched = False
        if "warning" in row:
            self._tell([row["warning"]])
            return
        if "workers" in row:
            members = {int(worker): incarnation for worker, incarnation in row["workers"].items()}
            returned = row.get("returned", False)
            self._tell(self.changes.note_members(members, self.progress.step, row["time"], returned=returned))
            return
        step = row["step"]
        if "grad_norm" in row:
            if step == self.unlogged[0]:
                self.unlogged[1][GRAD_NORM] = row["grad_norm"]
                self.progress.metrics[f"train/{GRAD_NORM}"] = row["grad_norm"]
            return
        self._log()
        if self.last_time is not None:
            self.books.step_times.add(max(row["time"] - self.last_time, 0.0))
        self.last_time = row["time"]
        self.changes.note_step(row["time"])
        # After a rollback, steps are committed again; the metrics files contain each step once.
        if step <= self.progress.step:
            return
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

    def _tell(self, texts: Iterable[str]) -> None:
        for text in texts:
            if not self.silent:
                say(text)

    def _log(self) -> None:
        """Write the metrics of the last step, once the line with its gradient norm has been read."""
        (step, found, stamped), self.unlogged = self.unlogged, (0, {}, {})
        if step and self.books.logs(step):
            self.books.log(step, found, stamped)

    # Cuts.

    def _note(self, effect: effects.Effect) -> None:
        """Keep what the reader shows until its turn is over: an evaluation takes long."""
        if isinstance(effect, effects.Offered | effects.CutRead):
            self.shown = effect

    def _look_at_cut(self, steps: Any) -> None:
        shown, self.shown = self.shown, None
        if isinstance(shown, effects.Offered):
            self._read_steps(steps)  # the steps up to the cut were written before it was offered
            self._log()
            self._take_offer(shown.offer)
        elif shown is not None:
            self._judge(shown)

    def _take_offer(self, offer: messages.Offer) -> None:
        """Find out what is due, and read what that needs."""
        if offer.step < self.progress.step and not (self.halt or offer.end_reason):
            # The shards have returned to a saved cut, and this step was judged before that.
            self._answer(offer, "")
            return
        # A cut says exactly which batches were trained; between cuts, the examples of each step are added up.
        seen = examples_seen(self.plan, offer.trained)
        self.progress.advance(offer.step, seen, self.plan.settings.num_examples)
        self.evaluation_due |= self.books.evaluations.due() or offer.end_reason not in ("", "preempted")
        self.save_due |= self.books.saves.due() and self.books.may_save()
        if self.save_due or self._reason(offer):
            self.driver.proceed(messages.Want(WHOLE))
        elif self.evaluation_due:
            whole = self.judge.needs_opt_state or self.books.hooks.has("on_evaluation")
            self.driver.proceed(messages.Want(WHOLE if whole else (messages.PARAMS,)))
        else:
            self._decide(offer, "")

    def _judge(self, cut: effects.CutRead) -> None:
        """Evaluate and save what was read; read the rest if the evaluation asks for a checkpoint."""
        offer, self.state = cut.offer, self.judge.state(cut)
        self._evaluate(cut, self.state)
        reason = self._reason(offer)
        now = self.books.unsaved_best or bool(reason)
        if now and not cut.opt_state:
            self.driver.proceed(messages.Want(WHOLE))
            return
        due = self.save_due or now
        if not reason:
            self._decide(offer, "")  # first: training continues while this process saves what it has read
        if due:
            self._save(offer, self.state, is_last=bool(reason))
        if reason:
            self._decide(offer, reason)

    def _answer(self, offer: messages.Offer, reason: str) -> None:
        """Send the verdict at once."""
        self.driver.proceed(messages.Verdict(offer.term, offer.number, reason))
        self.world.turn(self.driver)

    def _decide(self, offer: messages.Offer, reason: str) -> None:
        self.evaluation_due = self.save_due = False
        self._answer(offer, reason)
        self.end_reason = reason or None
        self.books.write_record(None)

    def _reason(self, offer: messages.Offer) -> str:
        """Return why the run ends with this cut; "" if it continues."""
        return NONFINITE if self._diverged(offer) else self.rule(self.progress) or self.halt or offer.end_reason

    def _evaluate(self, cut: effects.CutRead, state: TrainState) -> None:
        """Evaluate if due: also before a stop, since a resume continues after it; not what is of no use."""
        if not self.evaluation_due or self.mistake is not None or self._diverged(cut.offer):
            return
        if self.evaluated != cut.chains:
            self.progress.last_evaluation = 0  # it may have been this step, before a return to a saved cut
        with self._saved_at_mistakes():
            self.books.evaluate(state)
            self.evaluated = cut.chains

    @contextlib.contextmanager
    def _saved_at_mistakes(self) -> Iterator[None]:
        """End the run as a stop signal does if a hook or a metric fails, which is raised once the step is saved."""
        try:
            yield
        except UserError as error:
            self.mistake, self.halt = error, self.halt or "preempted"

    def _diverged(self, offer: messages.Offer) -> bool:
        """Return whether a gradient or the loss is not finite."""
        return offer.end_reason == NONFINITE or stop.nonfinite()(self.progress) is not None

    def _report_nonfinite(self) -> None:
        """Collect the reports of the workers on gradients that are not finite."""
        found = sorted((self.directory / run_folder.NONFINITE_NAME).glob("*.txt"))
        self.books.report_nonfinite("\n".join(path.read_text() for path in found))

    def _save(self, offer: messages.Offer, state: TrainState, *, is_last: bool) -> None:
        """Save the state of a cut; a run that diverged saves nothing, nor does a full disk."""
        if self._diverged(offer):
            return
        if (self.books.checkpointer.latest_step() or 0) > offer.step:
            return  # from before a return to a saved cut: the run resumes from there
        place = shared_plan.position(self.plan, offer.trained.step)
        beyond = {BEYOND: list(offer.trained.beyond)} if offer.trained.beyond else {}
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
        """Have the run end if it is to; at once if nothing was trained, since the state is the one of its start."""
        limit = self.plan.experiment.stop.max_seconds
        if not self.halt and stop_requested():
            self.halt = "preempted"
            self.end_reason = self.halt if self.is_untouched else None
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
        """Return the `ps` entry of run.json: the counters of all processes, of those that died and earlier attempts."""
        counters = Counter({name: count for name, count in self.counted_before.items() if name != "staleness"})
        staleness = Counter({int(key): count for key, count in self.counted_before.get("staleness", {}).items()})
        for path in (self.directory / run_folder.STATISTICS_NAME).glob("*.json"):
            with contextlib.suppress(json.JSONDecodeError):
                content = json.loads(path.read_text())
                counters.update(content["counters"])
                staleness.update({int(key): count for key, count in content["staleness"].items()})
        names = ("updates", "duplicates_refused", "fenced", "torn_pushes", "failovers", "rollbacks", "refused")
        return {name: counters[name] for name in names} | {"staleness": dict(sorted(staleness.items()))}

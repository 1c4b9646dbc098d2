"""One attempt at training an experiment in this process: from a run directory to its run record."""

import contextlib
import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import errors, stop
from jaxdist.checkpoint import checkpoints, snapshots
from jaxdist.config import hook_points
from jaxdist.config.experiment import Experiment
from jaxdist.data import Position
from jaxdist.data.assembly import BadExampleError, ExampleError
from jaxdist.guards import nonfinite, recompile, replicas
from jaxdist.launch.joining import agreement, runtime, same_on_all, turn
from jaxdist.launch.supervising import watchdog
from jaxdist.run import (
    bookkeeping,
    components,
    directory,
    disk_room,
    handover,
    header,
    hooks,
    loop,
    preflight,
    recovery,
    rescue,
)
from jaxdist.run.diagnosis import profiling, utilization
from jaxdist.run.replay import auditing, recording
from jaxdist.run.stopwatch import Stopwatch
from jaxdist.run.warm_start import beginning
from jaxdist.rundir import full_disk, record, writers
from jaxdist.setting_group import setting_group
from jaxdist.spmd.state import TrainState


@setting_group
class RunOptions:
    """What the command line decides, not the experiment.

    Attributes:
      run_dir: where the run record, the metrics and the checkpoints are written.
      resume: continue from the newest checkpoint there.
      overwrite: replace the run there, if there is one.
      checkpoint: with `resume`, the saved step to continue from; newer ones are set aside. None for the newest.
      profile: the steps that process 0 traces by `jax.profiler`, into the folder `profile` of the run directory.
      silent: show nothing while training.
      command: the command line, for the run record.
      stop_requested: asked after each step whether this process wants to stop and save; all then stop at one step.
      in_reserve: the turn of a process in reserve, which it waits for once it is prepared.
      identity: of the experiment, where it is known already; taking it may look at every file of the data.
      source: the experiment's file and overrides, recorded so that the trained run can be loaded.
      put_together: makes the parts; that of a sweep shares programs between its runs.
    """

    run_dir: pathlib.Path
    resume: bool = False
    overwrite: bool = False
    checkpoint: int | None = None
    profile: range | None = None
    silent: bool = False
    command: str = ""
    stop_requested: Callable[[int], bool] = lambda step: False
    in_reserve: turn.Turn | None = None
    identity: components.Identity | None = None
    source: bookkeeping.ExperimentSource | None = None
    put_together: Callable[..., components.Parts] = components.put_together

    @staticmethod
    def accept(values: dict[str, Any]) -> dict[str, Any]:
        """Return the options with the run directory made a path."""
        given = values.get("run_dir")
        return values | {"run_dir": pathlib.Path(given)} if isinstance(given, str) else values


def train(experiment: Experiment, options: RunOptions, *, devices: Sequence[jax.Device]) -> record.RunRecord:
    """Train `experiment` on `devices` until its stop rule ends it; return the run record, which is written too.

    Raises:
      UserError: invalid settings, an unusable run directory, or a damaged checkpoint.
    """
    run: _Run | None = None
    with contextlib.ExitStack() as stack:
        with errors.as_user_error():
            preflight.check_settings(experiment)
            writers.check(experiment.writers)
            stop_rule = experiment.stop.rule()
            hashes = options.source.hashes if options.source else None
            handed = handover.Handover(recovery.memory(), experiment, options.identity, hashes, len(devices))
            handed.take_over()
            parts = options.put_together(experiment, devices=devices, identity=options.identity)
            began_with = None if options.resume else _check_weights(parts, options)
            if options.in_reserve is not None:
                recovery.rehearse(parts, options.in_reserve.has_come)
                options.in_reserve.wait()
            earlier = _take_run_dir(parts, options, stack)
            directory.tell_of_times(experiment, earlier)
            directory.tell_of_edits(experiment, earlier, hashes or {})
            for eval_loader in parts.eval_loaders.values():
                stack.enter_context(eval_loader)
            stopwatch = Stopwatch(earlier.time_seconds if earlier else None)
            stopwatch.add("restart", recovery.seconds_since_failure())
            dog = stack.enter_context(
                recovery.watched(
                    experiment.recovery,
                    options.run_dir,
                    where=lambda: (run.books.progress.step if run else 0, stopwatch.phase),
                    on_hang=lambda verdict: run.record_hang() if run else None,
                )
            )
            agreed = stack.enter_context(agreement.of_job())
            with stopwatch.account("restart"):
                # Process 0 writes to the directory next; the others must have checked it by then.
                agreed.meet("the run directory is checked")
                if options.overwrite:
                    if runtime.is_first():
                        directory.set_run_aside(options.run_dir, of_job=not runtime.is_alone())
                    agreed.meet("the earlier run is removed")
            with directory.naming_what_changed(experiment, earlier):
                start = _begin(stack, parts, options, stopwatch, earlier, agreed, began_with)
            if runtime.is_first():
                directory.leave_servers(options.run_dir, start.progress.step)
            continued = parts.continued(start.progress)
            if continued is not parts:
                handed.end()
            run = _Run(continued, options, start, stopwatch, earlier, agreed, handed)
        dog.report()
        return run.execute(stop_rule, dog)


def _take_run_dir(parts: components.Parts, options: RunOptions, stack: contextlib.ExitStack) -> record.RunRecord | None:
    """Prepare the run directory and return the record of the run that is resumed, None for a new run."""
    prepare = functools.partial(
        directory.prepare_run_dir,
        parts.experiment,
        parts.identity,
        options.run_dir,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    if not (runtime.is_alone() and runtime.is_first()):  # a supervisor holds the lock for its processes
        return prepare()
    earlier = directory.take_run_dir(options.run_dir, prepare, stack, purpose=options.command)
    if not options.resume or jax.process_count() > 1:
        return earlier
    stays = directory.what_stays(parts.experiment)
    return rescue.save_left(rescue.Rescue.of(options.run_dir, parts.identity, stays)) or earlier


@dataclasses.dataclass(frozen=True)
class _Start:
    """The start of an attempt: the state, the data position (None for the first), the progress, and where to save."""

    state: TrainState
    position: Position | None
    progress: stop.Progress
    checkpointer: checkpoints.Checkpointer
    snapshots: snapshots.Snapshots | None
    began_with: beginning.WarmStart | None = None


def _check_weights(parts: components.Parts, options: RunOptions) -> beginning.WarmStart | None:
    """Return the weights that the run begins with, the same in all processes; None without `init_from`.

    Raises:
      UserError: they cannot be used, or --overwrite would remove them.
    """
    try:
        beginning.check_not_removed(parts.experiment, options.run_dir, overwrite=options.overwrite)
        found = parts.check_weights()
    except errors.UserError as error:
        same_on_all.compare("weights", {"mistake": str(error)})
        raise
    if found is not None:
        same_on_all.compare("weights", {"SHA-256 of the weights of init_from": found.sha256})
    return found


def _begin(
    stack: contextlib.ExitStack,
    parts: components.Parts,
    options: RunOptions,
    stopwatch: Stopwatch,
    earlier: record.RunRecord | None,
    agreed: agreement.Agreement,
    began_with: beginning.WarmStart | None,
) -> _Start:
    """Return the newest state of the run, or a new one; `stack` closes the checkpoints and the snapshots."""
    with stopwatch.account("restart"):
        saved = directory.open_checkpoints(parts.experiment, options.run_dir, parts.identity)
        stack.enter_context(contextlib.closing(saved))
        if options.checkpoint is not None:
            directory.go_back(saved, options.run_dir, options.checkpoint, agreed)
        in_memory = recovery.open_snapshots(parts.experiment.recovery, str(parts.identity))
        if in_memory:
            stack.enter_context(contextlib.closing(in_memory))
        found = recovery.restore_newest(parts.abstract_state, saved, in_memory) if options.resume else None
    if found is None:
        directory.check_nothing_is_lost(earlier, options.run_dir, saved)
        # A run that ended before its first checkpoint restarts from its first step.
        if earlier is not None and began_with is None:
            began_with = _check_weights(parts, options)
            if began_with is not None:
                beginning.check_same(began_with, earlier.extra.get("init_from"))
        with stopwatch.account("compile"):
            start = _Start(parts.create_state(), None, stop.Progress(), saved, in_memory, began_with)
    else:
        state, data_state = found
        position = Position.from_json(data_state["position"])
        with errors.as_user_error():
            position.check_resumable(parts.loader.beginning)
        start = _Start(state, position, stop.Progress.from_json(data_state["progress"]), saved, in_memory)
        if options.checkpoint is None and runtime.is_first():
            directory.tell_what_is_gone(earlier, options.run_dir, start.progress.step)
    if in_memory:
        in_memory.begin(start.progress.step)
    return start


class RecompileWarning(UserWarning):
    """The step was compiled a second time: a run that should take seconds a step may take minutes."""


class _Run:
    """The loop of one attempt, with its hooks."""

    def __init__(
        self,
        parts: components.Parts,
        options: RunOptions,
        start: _Start,
        stopwatch: Stopwatch,
        earlier: record.RunRecord | None,
        agreed: agreement.Agreement,
        handed: handover.Handover,
    ):
        self.parts, self.options, self.start, self.agreed = parts, options, start, agreed
        self._handed = handed
        self.chain: recording.ChainRecorder | None = None
        self.auditor = auditing.auditor_of(parts, earlier)
        self.experiment, self.mesh = parts.experiment, parts.strategy.mesh
        self.sentinel = recompile.RecompileSentinel(parts.step)
        self.books = bookkeeping.Bookkeeper(
            bookkeeping.Facts(
                experiment=self.experiment,
                identity=parts.identity,
                run_dir=options.run_dir,
                strategy=self.experiment.strategy,
                num_devices=self.mesh.size,
                num_processes=jax.process_count(),
                fields=parts.fields,
                steps_per_epoch=parts.loader.steps_per_epoch,
                learning_rate=parts.learning_rate,
                command=options.command,
                silent=options.silent,
                earlier=earlier,
                source=options.source,
                began_with=start.began_with,
                header=self._header,
            ),
            start.checkpointer,
            start.progress,
            stopwatch,
            evaluate=None if parts.eval_step is None else parts.evaluate,
            extra=self._found_by_guards,
        )
        traced = options.profile if options.profile and jax.process_index() == 0 else range(0)
        self.trace = profiling.Trace(traced, options.run_dir)
        self.log = hooks.LogMetrics(self.books)
        self.books.before_save = self._flush
        self._change_due = recovery.change_due()
        self._newest: loop.StepInfo | None = None

    def execute(self, stop_rule: stop.StopRule, dog: watchdog.Watchdog) -> record.RunRecord:
        """Train, evaluate the last step if needed, save, and write the record, also of an error before it is raised."""
        try:
            return self._train(stop_rule, dog)
        except Exception as error:
            with contextlib.suppress(OSError):  # for example on a full disk: the user is told what happened first
                self.books.write_record("faulty_device" if isinstance(error, auditing.FaultyDeviceError) else "error")
            explained = _explained(error)
            if jax.process_count() > 1:
                # While closing, a checkpointer would wait for processes that are waiting for this one.
                if explained is None:
                    runtime.print_for_developers(error)
                else:
                    errors.say(explained)
                runtime.leave(1 if explained is None else explained.exit_status)
            if explained is None or explained is error:
                raise
            raise explained from error

    def _train(self, stop_rule: stop.StopRule, dog: watchdog.Watchdog) -> record.RunRecord:
        books, start = self.books, self.start
        ledger = recovery.recorded(
            self.experiment.recovery, self.options.run_dir, step=start.progress.step, place=start.position
        )
        chain = recording.recorder_of(
            self.parts, self.options.run_dir, step=start.progress.step, earlier=books.attempt.earlier
        )
        with books.shown(), ledger as ledger_hooks, chain as self.chain, self.trace, self._saved_at_mistakes():
            books.call_hooks("on_start", start.state)
            self.trace.begin(start.progress.step + 1)
            result = loop.fit(
                self._traced_step if self.options.profile else self._watched_step,
                start.state,
                self.parts.batches(start.position),
                stop=stop_rule,
                hooks=[lambda info: dog.report(), self._note_newest, *self._make_hooks(ledger_hooks)],
                progress=books.progress,
                stop_requested=self.agreed.stop(lambda step: self._change_due() or self.options.stop_requested(step)),
                stopwatch=books.stopwatch,
                step_times=books.step_times,
            )
            if self.auditor:
                self.auditor.settle()
            self._flush()
            if self.chain:
                self.chain.finish(result.progress.step)
            if result.end_reason == "preempted" and self._is_kept_for_change(result):
                return books.make_record(None)
            if result.nonfinite:
                self._report_nonfinite(result.state, result.nonfinite)
            elif result.position is not None and (names := nonfinite.leaves_with_nan(result.state.params)):
                start.checkpointer.wait()
                self.books.report_nonfinite(nonfinite.explain_params(names, step=result.progress.step))
                result = dataclasses.replace(result, end_reason="nonfinite")
            else:
                self._finish(result)
            if result.end_reason != "preempted" and utilization.peak_of(self.mesh.devices.flat[0]) is not None:
                books.flops_per_step = utilization.flops_of(self.parts)
            made = books.finish(result.end_reason, self._whole(result.state.params))
            books.call_hooks("on_end", result.state, end_reason=result.end_reason)
            return made

    def _note_newest(self, info: loop.StepInfo) -> None:
        self._newest = info

    @contextlib.contextmanager
    def _saved_at_mistakes(self) -> Iterator[None]:
        """Save the newest step before an error that left the state as it should be ends the run.

        That is one of the user's data or hooks, or of a file that cannot be written: then the state stays in memory.

        In a job of several processes the others would have to take part; its supervisor saves the newest snapshot.
        """
        try:
            yield
        except Exception as error:
            of_files = isinstance(error, full_disk.UnwritableError | checkpoints.CheckpointError)
            if jax.process_count() == 1 and (of_files or isinstance(_explained(error), errors.UserError)):
                with contextlib.suppress(Exception):  # the user is told what happened first
                    self._keep_newest(of_files)
            raise

    def _keep_newest(self, in_memory: bool) -> None:
        """Keep the newest step unless its state went into a step that failed, or is not finite."""
        info = self._newest
        if info is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(info.state)) or info.state.step < 0:
            return
        if not in_memory:
            self.books.save(info.state, info.position)
            self.start.checkpointer.wait()
            errors.say(bookkeeping.saved_at_mistake(info.step))
        elif kept := self._put_in_memory(info.state, info.position):
            errors.say(disk_room.where_kept(info.step, kept))

    def _found_by_guards(self) -> dict[str, Any]:
        """Return what the guards add to the run record."""
        found: dict[str, Any] = {"chain": self.chain.summary()} if self.chain else {}
        return found | ({"audit": self.auditor.summary()} if self.auditor else {})

    def _flush(self) -> None:
        """Write what the hooks read some steps late."""
        self.log.flush()
        if self.chain:
            self.chain.flush()

    def _is_kept_for_change(self, result: loop.FitResult) -> bool:
        """Return whether the run ended only so that the number of its processes can change, and is kept in memory."""
        kept = self.start.snapshots
        wanted = self._change_due() and not self.options.stop_requested(result.progress.step)
        if kept is None or not same_on_all.from_first("change", "yes" if wanted else ""):
            return False
        recovery.note_end_for_change()
        data_state = {"position": result.position.to_json(), "progress": result.progress.to_json()}
        kept.save(result.progress.step, result.state, data_state)
        kept.wait()
        return same_on_all.all_of("kept for a change", kept.written_step == result.progress.step)

    def _finish(self, result: loop.FitResult) -> None:
        """Evaluate and save the last step, unless that was done; a preempted run has no time for an evaluation."""
        if result.end_reason != "preempted":
            self.books.evaluate(result.state)
        # A resumed run may already have ended, with its newest state only in memory.
        position = result.position or self.start.position
        if position is None:
            return
        try:
            self.books.save(result.state, position)
            self.start.checkpointer.wait()
        except checkpoints.CheckpointError as error:
            if not disk_room.is_no_room(error):
                raise
            self._keep_in_memory(result.state, position)

    def _keep_in_memory(self, state: TrainState, position: Position) -> None:
        """Keep the last state in memory, since the disk is full; a supervisor tries to save it once more.

        Raises:
          RunFailedError: there is no supervisor; the message says where the state is.
        """
        kept = self._put_in_memory(state, position)
        if kept and self.start.snapshots:
            self.books.kept_for_supervisor = True
            return
        raise disk_room.no_room(self.options.run_dir, self.books.progress.step, kept)

    def _put_in_memory(self, state: TrainState, position: Position) -> str:
        """Keep a state that cannot be saved in memory; return where it is, "" if nowhere."""
        progress, identity = self.books.progress, str(self.parts.identity)
        data_state = {"position": position.to_json(), "progress": progress.to_json()}
        where = self.options.run_dir, self.start.snapshots, identity
        return disk_room.keep_in_memory(*where, progress.step, state, data_state)

    def _watched_step(self, state: TrainState, batch: Any) -> Any:
        if self.auditor:
            self.auditor.before(state, batch, self.books.progress.step + 1)
        outputs = self.parts.step(state, batch)
        if self.auditor:
            self.auditor.after(outputs[1])
        if self.experiment.guards.recompile:
            found = self.sentinel.observe(self.parts.step, (state, batch))
            self.books.compile_count = self.sentinel.compile_count
            if found:
                warnings.warn(str(found), RecompileWarning, stacklevel=1)
        return outputs

    def _traced_step(self, state: TrainState, batch: Any) -> Any:
        with self.trace.step(self.books.progress.step + 1):
            return self._watched_step(state, batch)

    def record_hang(self) -> None:
        """Record that the run hangs; called by the watchdog's thread while the main thread is blocked."""
        self.books.make_record("hang").write(self.options.run_dir)

    def _make_hooks(self, ledger_hooks: Sequence[loop.Hook]) -> list[loop.Hook]:
        books = self.books
        found: list[loop.Hook] = [self._agree_on_time()] if self.experiment.stop.max_seconds is not None else []
        found += [*ledger_hooks, self.log]  # before a hook of the user, whose error ends the run after this step
        if self.chain:
            found.append(self.chain)
        if books.hooks.has(hook_points.ON_STEP):
            found.append(self._call_user_hooks)
        # Without held-out data nothing is due: to look whether the step is finite would wait for it every epoch.
        found += [hooks.evaluate_when_due(books)] if self.parts.eval_step is not None else []
        found.append(hooks.show_progress(books))
        every = self.experiment.guards.check_replicas_every
        if every and self.mesh.size > 1:
            found.append(hooks.every(every, lambda info: replicas.check_replicas(info.state, self.mesh)))
        told = [recovery.tell_recovery(self.options.run_dir), recovery.tell_modules()]
        told.append(recovery.ask_for_reserve(self.experiment.recovery, self.mesh))
        told.append(self._handed.leave())
        found += [hook for hook in told if hook]
        if self.options.profile:
            found.append(self.trace)
        if self.start.snapshots:
            settings, step_seconds = self.experiment.recovery, functools.partial(books.step_times.quantile, 0.5)
            agreed = self.agreed.number("snapshot interval", 1.0)
            take = recovery.snapshots_when_due(self.start.snapshots, settings, step_seconds, agreed, self.log.flush)
            found.append(take)
        room = self.agreed.number("room on the disk", 1.0)
        save = hooks.save_when_due(books, agreed=self.agreed.number("affordable saves", 1.0))
        return [*found, disk_room.unless_full(save, self.options.run_dir, agreed=room)]

    def _call_user_hooks(self, info: loop.StepInfo) -> None:
        def metrics() -> dict[str, float]:
            return {f"train/{name}": value for name, value in hooks.fetch(info.metrics).items()}

        self.books.call_hooks(hook_points.ON_STEP, info.state, metrics)

    def _agree_on_time(self) -> loop.Hook:
        """Return the hook that gives all processes one clock, because max_seconds must end them at the same step."""
        agreed = self.agreed.number("seconds", self.start.progress.seconds)

        def agree(info: loop.StepInfo) -> None:
            info.progress.seconds = agreed(info.progress.seconds)

        return agree

    def _header(self) -> str:
        return header.render(
            self.experiment,
            params=self.parts.abstract_state.params,
            devices=header.describe_devices(self.mesh),
            share=f"{self.parts.sizes.device_batch_size} on each device",
            steps_per_epoch=self.parts.loader.steps_per_epoch,
            run_dir=self.options.run_dir,
            step=self.start.progress.step,
            began_with=self.start.began_with,
        )

    def _report_nonfinite(self, state: TrainState, found: loop.NonFinite) -> None:
        if found.leaf > len(jax.tree.leaves(state.params)):
            rate = self.parts.learning_rate and self.parts.learning_rate(found.step)
            report = nonfinite.explain_factors(self.parts.optimizer, state, step=found.step, learning_rate=rate)
        else:
            functions = self.parts.functions
            report = str(nonfinite.explain_nonfinite(functions.loss_fn, state, found.batch, step=found.step))
        self.books.report_nonfinite(report)

    def _whole(self, params: Any) -> Any:
        """Return `params` gathered on each process; every process must call it."""
        if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
            return params
        return jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))


def _explained(error: Exception) -> errors.UserError | errors.RunFailedError | None:
    """Return the error with the message for the user, None where the traceback is more useful."""
    if isinstance(error, BadExampleError):
        return errors.UserError(f"{error}. Repair or remove it, or skip such examples with data.on_bad=skip.")
    if isinstance(error, ExampleError):
        return errors.UserError(errors.describe(error))
    if isinstance(error, errors.RunFailedError | errors.UserError):
        return error
    if (found := errors.of_callback(error)) is not None:
        return found
    if isinstance(error, checkpoints.CheckpointError) or full_disk.is_full(error):
        return errors.RunFailedError(str(error))
    return None

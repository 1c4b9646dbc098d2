"""Training one experiment in this process, from a run directory to its run record."""

import contextlib
import dataclasses
import errno
import functools
import os
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import errors, stop
from jaxdist.checkpoint import checkpoints
from jaxdist.checkpoint import snapshots as snapshot
from jaxdist.config.experiment import Experiment
from jaxdist.data import Position
from jaxdist.data.assembly import BadExampleError
from jaxdist.errors import ConfigError
from jaxdist.guards import nonfinite, recompile, replicas
from jaxdist.launch.joining import agreement, runtime
from jaxdist.launch.supervising import fork_server, hosts, local_job, supervisor, watchdog
from jaxdist.run import components, disk_room, header, hooks, loop, recovery, rescue
from jaxdist.run import progress_display as progress
from jaxdist.run.stopwatch import StepTimes, Stopwatch
from jaxdist.rundir import lock, record, writers
from jaxdist.spmd.state import TrainState

CHECKPOINTS_NAME = "checkpoints"
SET_ASIDE_NAME = "set-aside"
"""Folder for checkpoints that are newer than one the user went back to."""
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_RUN_FILES = (CHECKPOINTS_NAME, writers.JSONL_NAME, writers.CSV_NAME, writers.TENSORBOARD_NAME)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line decides, not the experiment.

    Attributes:
      run_dir: where the run record, the metrics and the checkpoints go.
      resume: go on from the newest checkpoint there.
      checkpoint: with `resume`, the saved step to continue from; newer ones are set aside. None for the newest.
      silent: show nothing while training.
      command: the command line, for the run record.
      stop_requested: asked after each step whether this process wants to stop and save; all then stop at one step.
    """

    run_dir: pathlib.Path
    resume: bool = False
    checkpoint: int | None = None
    silent: bool = False
    command: str = ""
    stop_requested: Callable[[int], bool] = lambda step: False


def default_run_dir(name: str, *, resume: bool, root: pathlib.Path = pathlib.Path("runs")) -> pathlib.Path:
    """Return `runs/NAME-TIME`, or, to resume, the newest such directory."""
    if not resume:
        return root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    earlier = sorted(path for path in root.glob(f"{name}-[0-9]*-[0-9]*") if path.is_dir())
    if not earlier:
        raise ConfigError(f"There is no run of {name} to resume in {root}/. Name one with --run-dir.")
    return earlier[-1]


def prepare_run_dir(identity: components.Identity, run_dir: pathlib.Path, *, resume: bool) -> record.RunRecord | None:
    """Create the run directory, or check that it may be used; return the record of the run to resume.

    Raises:
      ConfigError: not writable, holding another experiment's run, or a run that `resume` does not ask for; or
        nothing to resume. Nothing is overwritten.
    """
    exists = (run_dir / record.FILE_NAME).exists()
    if resume and not exists:
        raise ConfigError(f"--resume needs a run to go on with; {run_dir} holds none. Drop --resume to start one.")
    earlier = None
    if exists:
        earlier = record.RunRecord.read(run_dir)
        said = earlier.extra.get("identity")
        theirs = said if isinstance(said, dict) else {}
        if theirs != dataclasses.asdict(identity):
            raise ConfigError(
                f"{run_dir} holds a run of another experiment: {identity.differences(theirs)}. "
                "Choose another --run-dir."
            )
        if not resume:
            raise ConfigError(f"{run_dir} already holds a run. Add --resume to go on with it, or choose another.")
    leftovers = [name for name in _RUN_FILES if (run_dir / name).exists()]
    if leftovers and not exists:
        raise ConfigError(
            f"{run_dir} holds {', '.join(leftovers)} but no {record.FILE_NAME}, so nobody knows what run they are of. "
            "Choose another --run-dir, or move them away."
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"The run directory must be writable; {run_dir} is not: {error.strerror}.") from error
    return earlier


def record_identity(run_dir: pathlib.Path) -> Any:
    """Return the identity that the run record says, None without a record that can be read."""
    try:
        return record.RunRecord.read(run_dir).extra.get("identity")
    except (OSError, ValueError):
        return None


def train(experiment: Experiment, options: RunOptions, *, devices: Sequence[jax.Device]) -> record.RunRecord:
    """Train `experiment` on `devices` until its stop rule ends it; return the run record, which is written too.

    Raises:
      UserError: settings that cannot work, a run directory that cannot be used, a checkpoint that is damaged.
    """
    run: _Run | None = None
    with contextlib.ExitStack() as stack:
        with errors.as_user_error():
            components.check_experiment(experiment)
            stop_rule = experiment.stop.rule()
            parts = components.put_together(experiment, devices=devices)
            earlier = prepare_run_dir(parts.identity, options.run_dir, resume=options.resume)
            if runtime.is_alone() and runtime.is_first():
                # Not before the checks: what is refused leaves no trace. A supervisor holds the lock for its processes.
                stack.enter_context(lock.locked(options.run_dir, purpose=options.command))
            stopwatch = Stopwatch(earlier.time_seconds if earlier else None)
            stopwatch.add("restart", recovery.seconds_since_failure())
            dog = stack.enter_context(
                recovery.watched(
                    experiment.recovery,
                    options.run_dir,
                    where=lambda: (run.start.progress.step if run else 0, stopwatch.phase),
                    on_hang=lambda verdict: run.record_hang() if run else None,
                )
            )
            agreed = stack.enter_context(agreement.of_job())
            with stopwatch.account("restart"):
                # Process 0 writes to the directory next; by then the others must have looked at it.
                agreed.meet("the run directory is checked")
                checkpointer = stack.enter_context(
                    contextlib.closing(make_checkpointer(experiment, options.run_dir, parts.identity))
                )
                if options.checkpoint is not None:
                    go_back(checkpointer, options.run_dir, options.checkpoint, agreed)
                snapshots = recovery.open_snapshots(experiment.recovery, str(parts.identity))
            if snapshots:
                stack.enter_context(contextlib.closing(snapshots))
            start = _start(parts, checkpointer, snapshots, stopwatch, resume=options.resume)
            parts = parts.continued(start.progress)
            run = _Run(parts, options, checkpointer, snapshots, stopwatch, start, earlier, agreed)
        dog.report()
        return run.execute(stop_rule, dog)


def supervise(
    experiment: Experiment,
    arguments: Sequence[str],
    *,
    run_dir: pathlib.Path,
    num_processes: int,
    forks: fork_server.ForkServer | None = None,
    checkpoint: int | None = None,
) -> int:
    """Run the command line `arguments` in `num_processes` supervised processes; return the exit status.

    The processes are forked by `forks` if it is given and can, and started afresh otherwise. With `checkpoint` they
    continue from that step, and newer ones are set aside; a restart after a failure continues from the newest.
    """

    def start(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> local_job.Process:
        child = forks.start(command, environment, output) if forks else None
        return child or local_job.start(command, environment, output)

    def at_kill(memory: pathlib.Path) -> None:
        if forks:
            forks.run_at_end("jaxdist.run.killed_supervisor", saved.to_text(), str(memory))

    jax.config.update("jax_platforms", "cpu")  # the accelerators belong to the processes
    identity = components.identity(experiment)
    saved = rescue.Rescue(
        run_dir=str(run_dir.absolute()),
        checkpoints=str((run_dir / CHECKPOINTS_NAME).absolute()),
        identity=str(identity),
        keep=checkpoint_settings(experiment),
    )
    with contextlib.closing(make_checkpointer(experiment, run_dir, identity)) as checkpointer:
        job = supervisor.Job(
            command=[sys.executable, "-m", "jaxdist.cli", *arguments],
            run_dir=run_dir,
            saved_step=lambda memory: recovery.saved_step(memory, checkpointer, str(identity)),
            start=start,
            save=saved.save,
            save_left=record_identity(run_dir) == dataclasses.asdict(identity),
            at_kill=at_kill,
            begin=lambda: None if checkpoint is None else go_back(checkpointer, run_dir, checkpoint, agreement.Alone()),
        )
        return supervisor.run(job, num_processes=num_processes, policy=recovery.policy(experiment.recovery))


def go_back(
    checkpointer: checkpoints.Checkpointer, run_dir: pathlib.Path, step: int, agreed: agreement.Agreement
) -> None:
    """Make `step` the newest checkpoint: move newer ones to the folder `set-aside`, where nothing looks for them.

    Every process of the run must call it, before any reads a checkpoint; process 0 moves.

    Raises:
      ConfigError: no such step is saved.
      CheckpointError: it is damaged, or of another experiment. Nothing was moved then.
    """
    saved = checkpointer.steps()
    if step not in saved:
        held = f"holds steps {', '.join(map(str, saved))}" if saved else "holds none"
        raise ConfigError(
            f"--checkpoint names a saved step; {run_dir / CHECKPOINTS_NAME} {held}. Choose another; got {step}."
        )
    checkpointer.verify(step)
    agreed.meet("the checkpoint to continue from is verified")
    if jax.process_index() == 0:
        checkpointer.set_aside_after(step, run_dir / SET_ASIDE_NAME)
    agreed.meet("newer checkpoints are set aside")


def supervise_host(experiment: Experiment, arguments: Sequence[str], host: hosts.Host, *, run_dir: pathlib.Path) -> int:
    """Run one host's part of a job on several, the command line `arguments` in each process; return the exit status."""
    identity = components.identity(experiment)
    with contextlib.closing(make_checkpointer(experiment, run_dir, identity)) as checkpointer:
        return hosts.run(
            host,
            [sys.executable, "-m", "jaxdist.cli", *arguments],
            run_dir=run_dir,
            saved_step=lambda: checkpointer.latest_step() or 0,
            policy=recovery.policy(experiment.recovery),
        )


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where a run begins: the state, the data position (None for the first) and the progress so far."""

    state: TrainState
    position: Position | None
    progress: stop.Progress


def _start(
    parts: components.Training,
    checkpointer: checkpoints.Checkpointer,
    snapshots: snapshot.Snapshots | None,
    stopwatch: Stopwatch,
    *,
    resume: bool,
) -> _Start:
    with stopwatch.account("restart"):
        found = recovery.restore_newest(parts.abstract_state, checkpointer, snapshots) if resume else None
    if found is None:
        # A run that ended before its first checkpoint is resumed from its first step: nothing else is lost.
        with stopwatch.account("compile"):
            start = _Start(parts.create_state(), None, stop.Progress())
    else:
        state, data_state = found
        position = Position.from_json(data_state["position"])
        start = _Start(state, position, stop.Progress.from_json(data_state["progress"]))
    if snapshots:
        snapshots.begin(start.progress.step)
    return start


def make_checkpointer(
    experiment: Experiment, run_dir: pathlib.Path, identity: components.Identity
) -> checkpoints.Checkpointer:
    """Return the checkpoints of a run directory."""
    return checkpoints.Checkpointer(
        run_dir / CHECKPOINTS_NAME, identity=str(identity), **checkpoint_settings(experiment)
    )


def checkpoint_settings(experiment: Experiment) -> dict[str, Any]:
    """Return the settings of the Checkpointer that say which checkpoints stay."""
    settings = experiment.checkpoints
    return {name: getattr(settings, name) for name in ("keep_last", "keep_every", "best_metric", "best_mode")}


class RecompileWarning(UserWarning):
    """The step was compiled a second time: a run that should take seconds a step may take minutes."""


class _Run:
    """One attempt at a run: from its start to its end, with everything that reports on it."""

    def __init__(
        self,
        parts: components.Training,
        options: RunOptions,
        checkpointer: checkpoints.Checkpointer,
        snapshots: snapshot.Snapshots | None,
        stopwatch: Stopwatch,
        start: _Start,
        earlier: record.RunRecord | None,
        agreed: agreement.Agreement,
    ):
        self.parts, self.options, self.checkpointer, self.snapshots = parts, options, checkpointer, snapshots
        self.stopwatch, self.start, self.earlier, self.agreed = stopwatch, start, earlier, agreed
        self.experiment = parts.experiment
        self.step_times = StepTimes()
        self.sentinel = recompile.RecompileSentinel()
        # From here on the directory is this run's: whatever happens next, it can be resumed.
        self.write_record(None, start.progress)
        resumed_step = start.progress.step if options.resume else None
        self.writers = writers.make_writers(options.run_dir, self.experiment.writers, resumed_step=resumed_step)
        self.log = hooks.LogMetrics(self.writers, every=self.experiment.log_every, extra=self._learning_rate)
        self.evaluate = self._make_evaluate()
        self.save = hooks.Save(
            checkpointer.save,
            stopwatch,
            every_steps=self.experiment.checkpoints.every_steps,
            before=[self.log.flush],
            after=[self._record_checkpoint],
        )

    def execute(self, stop_rule: stop.StopRule, dog: watchdog.Watchdog) -> record.RunRecord:
        """Train, evaluate once more if need be, save, and write the record; of an error, too, before it is raised."""
        try:
            return self._train(stop_rule, dog)
        except Exception as error:
            with contextlib.suppress(OSError):  # on a full disk, say: what happened first is what the user is told
                self.write_record("error", self.start.progress)
            explained = _explained(error)
            if jax.process_count() > 1:
                # On the way out a checkpointer would wait for processes that wait for this one.
                if explained is None:
                    traceback.print_exc()
                else:
                    print(f"jaxdist: {explained}", file=sys.stderr)
                runtime.leave(1 if explained is None else explained.exit_status)
            if explained is not None:
                raise explained from error
            raise

    def _train(self, stop_rule: stop.StopRule, dog: watchdog.Watchdog) -> record.RunRecord:
        with contextlib.ExitStack() as stack:
            for writer in self.writers:
                stack.callback(writer.close)
            ledger_hooks = stack.enter_context(self._make_ledger())
            display = stack.enter_context(self._make_display())
            result = loop.fit(
                self._watched_step,
                self.start.state,
                self.parts.batches(self.start.position),
                stop=stop_rule,
                hooks=[lambda info: dog.report(), *self._make_hooks(display, ledger_hooks)],
                progress=self.start.progress,
                stop_requested=self.agreed.stop(self.options.stop_requested),
                stopwatch=self.stopwatch,
                step_times=self.step_times,
            )
            self.log.flush()
            if result.nonfinite:
                self._report_nonfinite(result)
            else:
                self._finish(result)
            final = self.write_record(result.end_reason, result.progress, result.state)
            display.finish(summary(final, self.options.run_dir, self.checkpointer))
        return final

    def _finish(self, result: loop.FitResult) -> None:
        """Evaluate and save the last step, unless that was done; a preempted run has no time for an evaluation."""
        evaluated = result.progress.last_evaluation == result.progress.step
        if self.evaluate and result.end_reason != "preempted" and not evaluated:
            self.evaluate.run(result.state, result.progress)
        if result.position is not None:
            self.save.run(result.state, result.position, result.progress)
        self.checkpointer.wait()

    def _watched_step(self, state: TrainState, batch: Any) -> Any:
        outputs = self.parts.step(state, batch)
        if self.experiment.guards.recompile:
            found = self.sentinel.observe(self.parts.step, (state, batch))
            if found:
                warnings.warn(str(found), RecompileWarning, stacklevel=1)
        return outputs

    def record_hang(self) -> None:
        """Write down that the run hangs; from the watchdog's thread, while the main one is stuck."""
        self.make_record("hang", self.start.progress).write(self.options.run_dir)

    def _make_ledger(self) -> contextlib.AbstractContextManager[list[loop.Hook]]:
        settings, start = self.experiment.recovery, self.start
        return recovery.recorded(settings, self.options.run_dir, step=start.progress.step, place=start.position)

    def _make_hooks(self, display: progress.Progress, ledger_hooks: Sequence[loop.Hook]) -> list[loop.Hook]:
        found: list[loop.Hook] = [self._agree_on_time()] if self.experiment.stop.max_seconds is not None else []
        found += [self.log, hooks.show_progress(display)]
        found += [self.evaluate] if self.evaluate else []
        every = self.experiment.guards.check_replicas_every
        if every:
            found.append(hooks.every(every, lambda info: replicas.check_replicas(info.state, self.parts.strategy.mesh)))
        found += ledger_hooks
        if self.snapshots:
            settings = self.experiment.recovery
            agreed = self.agreed.number("snapshot interval", 1.0)
            step_seconds = functools.partial(self.step_times.quantile, 0.5)
            found.append(recovery.snapshots_when_due(self.snapshots, settings, step_seconds, agreed))
        room = self.agreed.number("room on the disk", 1.0)
        return [*found, disk_room.unless_full(self.save, self.options.run_dir, agreed=room)]

    def _agree_on_time(self) -> loop.Hook:
        """Return the hook that gives every process one clock, since max_seconds must end all of them at one step."""
        agreed = self.agreed.number("seconds", self.start.progress.seconds)

        def agree(info: loop.StepInfo) -> None:
            info.progress.seconds = agreed(info.progress.seconds)

        return agree

    def _make_evaluate(self) -> hooks.Evaluate | None:
        if self.parts.eval_step is None:
            return None
        when = self.experiment.eval
        return hooks.Evaluate(
            self.parts.evaluate,
            self.writers,
            self.stopwatch,
            every_steps=when.every_steps,
            every_epochs=when.every_epochs,
        )

    def _make_display(self) -> progress.Progress:
        limits = self.experiment.stop
        silent = self.options.silent or jax.process_index() != 0
        if not silent:
            print(self._header(), file=sys.stderr, flush=True)
        bounds = progress.Bounds(
            max_steps=limits.max_steps,
            max_epochs=limits.max_epochs,
            max_seconds=limits.max_seconds,
            steps_per_epoch=self.parts.loader.steps_per_epoch,
            step_offset=self.start.progress.schedule_offset,
        )
        return progress.make_progress(
            bounds,
            global_batch_size=self.experiment.global_batch_size,
            start_step=self.start.progress.step,
            carried_seconds=self.start.progress.seconds,
            deciding=progress.deciding(limits, self.start.progress),
            silent=silent,
        )

    def _header(self) -> str:
        return header.render(
            self.experiment,
            params=self.parts.abstract_state.params,
            mesh=self.parts.strategy.mesh,
            device_batch_size=self.parts.sizes.device_batch_size,
            steps_per_epoch=self.parts.loader.steps_per_epoch,
            run_dir=self.options.run_dir,
            step=self.start.progress.step,
        )

    def _learning_rate(self, step: int) -> Mapping[str, float]:
        return {} if self.parts.learning_rate is None else {"learning_rate": self.parts.learning_rate(step)}

    def _record_checkpoint(self, now: stop.Progress) -> None:
        self.write_record(None, now)

    def _report_nonfinite(self, result: loop.FitResult) -> None:
        assert result.nonfinite is not None
        report = nonfinite.explain_nonfinite(
            self.parts.functions.loss_fn, result.state, result.nonfinite.batch, step=result.nonfinite.step
        )
        if jax.process_index() == 0:
            write_nonfinite(self.options.run_dir, str(report), self.checkpointer)

    def _whole(self, params: Any) -> Any:
        """Return `params` so that each process holds all of them; every process must call it."""
        if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
            return params
        return jax.device_put(params, NamedSharding(self.parts.strategy.mesh, PartitionSpec()))

    def write_record(
        self, end_reason: str | None, now: stop.Progress, state: TrainState | None = None
    ) -> record.RunRecord:
        """Write run.json, on process 0, and return what it says."""
        made = self.make_record(end_reason, now, state)
        if jax.process_index() == 0:
            made.write(self.options.run_dir)
        return made

    def make_record(
        self, end_reason: str | None, now: stop.Progress, state: TrainState | None = None
    ) -> record.RunRecord:
        """Return the run record; the hash of the params is taken at the end only, when `state` is given."""
        seconds = self.stopwatch.seconds()
        busy = seconds["compute"] + seconds["input"]
        return record.RunRecord(
            end_reason=end_reason,
            step=now.step,
            examples_seen=now.examples_seen,
            params_sha256=None if state is None else record.params_sha256(self._whole(state.params)),
            metrics=now.metrics,
            strategy=self.experiment.strategy,
            reduction=self.experiment.reduction,
            num_devices=self.parts.strategy.mesh.size,
            num_processes=jax.process_count(),
            examples_per_second=now.examples_seen / busy if busy > 0 else None,
            step_seconds=self.step_times.summary(),
            time_seconds=seconds,
            compile_count=self.sentinel.compile_count,
            restarts=(self.earlier.restarts + 1) if self.earlier else 0,
            config=self.experiment,
            versions=record.versions(),
            command=self.options.command,
            extra={"identity": dataclasses.asdict(self.parts.identity)},
        )


def _explained(error: Exception) -> errors.UserError | errors.RunFailedError | None:
    """Return the error whose message says all there is to say to a user, None where the traceback says more."""
    if isinstance(error, BadExampleError):
        return errors.UserError(f"{error}. Mend or remove it, or leave such examples out with data.on_bad=skip.")
    if isinstance(error, checkpoints.CheckpointError) or getattr(error, "errno", None) in _DISK_IS_FULL:
        return errors.RunFailedError(str(error))
    return None


def write_nonfinite(run_dir: pathlib.Path, report: str, checkpointer: checkpoints.Checkpointer) -> None:
    """Write and show why a run ended as `nonfinite`, and what it leaves to go on from."""
    saved = checkpointer.latest_step()
    kept = "No checkpoint was saved yet." if saved is None else f"The checkpoint of step {saved} is kept."
    (run_dir / "nonfinite.txt").write_text(f"{report}\n{kept}\n")
    print(f"{report}\n{kept}", file=sys.stderr)


def summary(made: record.RunRecord, run_dir: pathlib.Path, checkpointer: checkpoints.Checkpointer) -> dict[str, object]:
    """Return what a user is shown when a run has ended."""
    evaluated = {name: value for name, value in made.metrics.items() if name.startswith("eval/") and value is not None}
    return {
        "end reason": made.end_reason,
        "step": made.step,
        **{name: f"{value:.4g}" for name, value in evaluated.items()},
        "run record": run_dir / record.FILE_NAME,
        "metrics": run_dir / writers.JSONL_NAME,
        "checkpoint": f"{run_dir / CHECKPOINTS_NAME} (step {checkpointer.latest_step()})",
    }

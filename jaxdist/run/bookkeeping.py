"""Bookkeeping of one attempt: its metrics, times, evaluations, checkpoints, display and run record.

Two loops share it: the one that trains in this process, and the one that observes a parameter server. A loop
advances `progress` and says where the state is; the rest is decided here, the same for both.
"""

import contextlib
import dataclasses
import datetime
import math
import pathlib
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxdist import errors
from jaxdist.checkpoint import checkpoints
from jaxdist.config.experiment import Experiment
from jaxdist.data import fingerprints
from jaxdist.launch.supervising import restart_events
from jaxdist.run import components, directory
from jaxdist.run.custom import user_hooks
from jaxdist.run.diagnosis import utilization
from jaxdist.run.progress_display import Bounds, Silent, deciding, make_display
from jaxdist.run.replay import comparison
from jaxdist.run.stopwatch import StepTimes, Stopwatch
from jaxdist.run.warm_start import beginning
from jaxdist.rundir import confusion, files, full_disk, origin, record, rich_values, writers
from jaxdist.rundir.remote import working_copy
from jaxdist.stop import Progress


@dataclasses.dataclass(frozen=True)
class ExperimentSource:
    """Where an experiment comes from: its file, and the assignments that override its settings.

    `hashes` are those of the file and of loaded files beside it, by name; empty if they are not known.
    """

    file: str
    assignments: tuple[str, ...] = ()
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about an attempt at its start and does not change.

    Attributes:
      experiment: what is trained.
      identity: what the run directory belongs to.
      run_dir: where the run record, the metrics and the checkpoints are written.
      strategy: the strategy in use.
      num_devices: of all processes.
      num_processes: of the attempt.
      fields: shapes and dtypes of a global batch.
      steps_per_epoch: batches of an epoch.
      learning_rate: step -> learning rate; None where the optimizer is optax's own.
      command: the command line, for the run record.
      silent: show nothing.
      earlier: the record of the run that is resumed.
      source: the file of the experiment and the settings changed on the command line; None from Python.
      began_with: the weights that the run began with in this attempt; None without, or where it is resumed.
      header: returns what is shown first; None shows no header.
    """

    experiment: Experiment
    identity: components.Identity
    run_dir: pathlib.Path
    strategy: str
    num_devices: int
    num_processes: int
    fields: Mapping[str, jax.ShapeDtypeStruct]
    steps_per_epoch: int
    learning_rate: Callable[[int], float] | None
    command: str
    silent: bool
    earlier: record.RunRecord | None
    source: ExperimentSource | None = None
    began_with: beginning.WarmStart | None = None
    header: Callable[[], str] | None = None


LARGEST_SHARE_OF_SAVES = 0.05
"""Of the time, where the experiment does not say which steps are saved: what happens beside the steps takes cores and
memory from them."""


class Due:
    """Says when something is due: every so many steps or, without these, every so many epochs.

    It may be called after some steps only; it is due once if one or more multiples were passed since the last call.
    """

    def __init__(self, progress: Progress, *, every_steps: int | None = None, every_epochs: int = 1) -> None:
        self._progress, self._every_steps, self._every_epochs = progress, every_steps, every_epochs
        self._passed = self._count()

    def due(self) -> bool:
        """Return whether a multiple was reached since the last call."""
        before, self._passed = self._passed, self._count()
        return self._passed > before

    def _count(self) -> int:
        if self._every_steps is not None:
            return self._progress.step // self._every_steps
        return self._progress.epoch // self._every_epochs


def stamp(progress: Progress) -> dict[str, float]:
    """Return how far the run is, for a row of metrics: examples trained on, and seconds of training."""
    return {"examples_seen": progress.examples_seen, "seconds": round(progress.seconds, 3)}


class Bookkeeper:
    """Keeps the records of one attempt; once it exists, the run directory belongs to this run and can be resumed.

    The stopwatch is running already, and the loop advances `progress` in place. `evaluate` returns the metrics of a
    state on the held-out data, None without such data; `extra` returns further keys of the run record.
    """

    def __init__(
        self,
        attempt: Facts,
        checkpointer: checkpoints.Checkpointer,
        progress: Progress,
        stopwatch: Stopwatch,
        *,
        evaluate: Callable[[Any], Mapping[str, float]] | None,
        extra: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.attempt, self.checkpointer, self.progress, self.stopwatch = attempt, checkpointer, progress, stopwatch
        self._evaluate, self._extra = evaluate, extra
        self.step_times = StepTimes()
        self.display: Any = Silent()
        self.compile_count = 0
        self.flops_per_step: float | None = None
        """Of all devices; counted once the run has ended, and only where the peak of the devices is known."""
        self.worker_changes: Sequence[Mapping[str, Any]] = ()
        """Workers of a parameter server that joined, left or restarted; see `changes` of the run record."""
        self.process_restarts = 0
        """Processes that were restarted one at a time during this attempt, while the others continued."""
        self.before_save: Callable[[], None] = lambda: None
        self.unsaved_best = False
        """Whether the present state is the best so far, and is to be saved."""
        self._told_of_lost_loss = False
        self.hooks = user_hooks.UserHooks(attempt.experiment.hooks, is_first=jax.process_index() == 0)
        self._measured: dict[str, int] = {}
        """The step of each metric's last value."""
        experiment = attempt.experiment
        self.evaluations = Due(
            progress, every_steps=experiment.eval.every_steps, every_epochs=experiment.eval.every_epochs
        )
        self.saves = Due(progress, every_steps=experiment.checkpoints.period)
        self._saved_step, self._began_at = checkpointer.latest_step(), progress.step
        self._origin = self._find_origin()
        self.kept_for_supervisor = False
        """Whether the last state is in memory alone, since the disk is full; the supervisor tries to save it."""
        self._is_recorded = attempt.earlier is not None
        """Whether there is a record: one that is older than the run is worth more than no run."""
        self._records = full_disk.Backlog[record.RunRecord](
            lambda made: made.write(attempt.run_dir), record.FILE_NAME, most_kept=1
        )
        self.write_record(None)
        resumed_step = progress.step if attempt.earlier else None
        made = writers.make_writers(
            attempt.run_dir,
            experiment.writers,
            resumed_step=resumed_step,
            name=attempt.identity.name,
            config=record.plain(experiment),
        )
        self._writers = [writers.Patient(writer) for writer in made]

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the run, and keep its writers open, while the context lasts."""
        attempt, limits = self.attempt, self.attempt.experiment.stop
        silent = attempt.silent or jax.process_index() != 0
        if attempt.header and not silent:
            print(attempt.header(), file=sys.stderr, flush=True)
        last_step = limits.last_step(attempt.steps_per_epoch, step_offset=self.progress.schedule_offset)
        bounds = Bounds(last_step=last_step, max_seconds=limits.max_seconds)
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
            self.display = make_display(
                bounds,
                global_batch_size=attempt.experiment.global_batch_size,
                start_step=self.progress.step,
                carried_seconds=self.progress.seconds,
                deciding=deciding(limits, self.progress),
                silent=silent,
            )
            stack.callback(self.display.close)
            yield

    def call_hooks(
        self,
        point: str,
        state: Any,
        metrics: Callable[[], Mapping[str, float]] | None = None,
        end_reason: str | None = None,
    ) -> None:
        """Call the experiment's hooks at a point of the run.

        `state` is that of the present step, or `user_hooks.NO_STATE`; `metrics` returns those of this point, None for
        the last value of each.
        """

        def make_info() -> user_hooks.HookInfo:
            return user_hooks.HookInfo(
                self.progress,
                self.attempt.run_dir,
                metrics=metrics or self.progress.newest_metrics,
                state=state,
                write=self._write_own,
                end_reason=end_reason,
            )

        self.hooks.call(point, make_info)

    def _write_own(self, metrics: Mapping[str, float], rich: Mapping[str, rich_values.RichValue]) -> None:
        step = self.progress.step
        if rich and self._writers and not any(writer.takes_rich_values for writer in self._writers):
            raise ValueError(
                f"Images, histograms, tables and texts ({', '.join(rich)}) need a writer that takes them; "
                f"{', '.join(self.attempt.experiment.writers)} take numbers only. Add tensorboard to the writers."
            )
        for writer in self._writers:
            if metrics:
                writer.write(step, {**stamp(self.progress), **metrics})
            if rich:
                writer.write_rich(step, rich)

    def logs(self, step: int) -> bool:
        """Return whether the training metrics of `step` are written."""
        return step == 1 or step % self.attempt.experiment.log_every == 0

    def log(self, step: int, metrics: Mapping[str, float], stamped: Mapping[str, float]) -> None:
        """Write the training metrics of a step with its stamp, and its learning rate, under `train/`."""
        rate = self.attempt.learning_rate
        values = metrics if rate is None else {**metrics, "learning_rate": rate(step)}
        named = {f"train/{name}": value for name, value in values.items()}
        self.progress.record_training(step, named)
        self._write_metrics(step, stamped, named)

    def evaluate(self, state: Any) -> None:
        """Evaluate `state`, that of the present step, unless this is done already or there are no held-out data.

        Where it is the best so far, `unsaved_best` asks for it to be saved.
        """
        if self._evaluate is None or self.progress.last_evaluation == self.progress.step:
            return
        with self.stopwatch.account("eval"):
            metrics = {f"eval/{name}": value for name, value in self._evaluate(state).items()}
        self.progress.record_evaluation(metrics)
        self._tell_of_lost_loss(metrics)
        self._write_metrics(self.progress.step, stamp(self.progress), metrics)
        self.unsaved_best = self._is_best()
        self.call_hooks("on_evaluation", state, lambda: metrics)

    def _tell_of_lost_loss(self, metrics: Mapping[str, float]) -> None:
        """Say once that the loss on held-out examples is not finite, which the numbers alone do not explain."""
        bad = [name for name, value in metrics.items() if name.split("/")[-1] == "loss" and not math.isfinite(value)]
        if bad and not self._told_of_lost_loss and jax.process_index() == 0:
            self._told_of_lost_loss = True
            errors.say(
                f"{bad[0]} is {metrics[bad[0]]} at step {self.progress.step}, while training continues. A "
                "label that is no class, or a value that is not finite, in the held-out examples does this; or the "
                "model overflows on them."
            )

    def _is_best(self) -> bool:
        """Return whether the watched metric was measured after the present step and is the best so far."""
        metric, mode = components.watched_metric(self.attempt.experiment)
        if metric is None or self._measured.get(metric) != self.progress.step:
            return False
        return self.progress.record_best(metric, self.progress.newest_metrics()[metric], mode)

    def may_save(self) -> bool:
        """Return whether a due step is saved: always where the experiment chose the steps, else if it costs little."""
        chosen = self.attempt.experiment.checkpoints.every_steps is not None
        return chosen or self.checkpointer.may_save(LARGEST_SHARE_OF_SAVES)

    def save(self, state: Any, place: Any, **more: Any) -> None:
        """Save a checkpoint of the present step, unless there is one.

        `place` is the position in the data, which has `to_json`; `more` goes into its data_state.
        """
        step, self.unsaved_best = self.progress.step, False
        if self._saved_step == step:
            return
        self.before_save()
        self._is_best()
        with self.stopwatch.account("checkpoint"):
            data_state = {"position": place.to_json(), "progress": self.progress.to_json(), **more}
            # The best checkpoint is chosen by the metrics of its own step, not of an earlier one.
            newest = self.progress.newest_metrics()
            own = {name: value for name, value in newest.items() if self._measured.get(name) == step}
            self.checkpointer.save(step, state, data_state, own)
        self._saved_step = step
        self._forget_replaced()
        self.write_record(None)
        self.call_hooks("on_checkpoint", state)

    def finish(self, end_reason: str, params: Any | None) -> record.RunRecord:
        """Wait for the last checkpoint, write the last record, show how the run ended, and return the record."""
        self.checkpointer.wait()
        self._forget_replaced()
        made = self.write_record(end_reason, params)
        self.display.update(made.step, made.metrics, epoch=self.progress.epoch)
        self.display.finish(self._summary(made))
        return made

    def _forget_replaced(self) -> None:
        """Remove the run that this one has replaced, once this one has a checkpoint that is complete."""
        if jax.process_index() == 0 and self.checkpointer.latest_step() is not None:
            directory.forget_replaced(self.attempt.run_dir)

    def write_record(self, end_reason: str | None, params: Any | None = None) -> record.RunRecord:
        """Write run.json, on process 0, and return what it says.

        While the run lasts, a record that a full disk does not take is written at the next occasion.
        """
        made = self._of_its_makers(self.make_record(end_reason, params))
        if jax.process_index() == 0:
            if self._is_recorded and (end_reason is None or self.kept_for_supervisor):
                self._records.add(made)
            else:
                made.write(self.attempt.run_dir)
            self._is_recorded = True
        return made

    def _of_its_makers(self, made: record.RunRecord) -> record.RunRecord:
        """Return the record; where the run had ended and this attempt trained nothing, with what the earlier one says.

        This attempt may have other settings and devices, which did not make the params.
        """
        earlier = self.attempt.earlier
        if earlier is None or made.params_sha256 is None or self.progress.step > self._began_at:
            return made
        same = ("end_reason", "step", "params_sha256", "metrics")
        if any(getattr(made, name) != getattr(earlier, name) for name in same):
            return made
        extra = {**earlier.extra, "changes": made.extra["changes"]}
        return dataclasses.replace(earlier, restarts=made.restarts, time_seconds=made.time_seconds, extra=extra)

    def make_record(self, end_reason: str | None, params: Any | None = None) -> record.RunRecord:
        """Return the run record; the hash of the params is taken at the end only, when they are given."""
        attempt, seconds = self.attempt, self.stopwatch.seconds()
        earlier_attempts = attempt.earlier.restarts + 1 if attempt.earlier else 0
        return record.RunRecord(
            end_reason=end_reason,
            step=self.progress.step,
            examples_seen=self.progress.examples_seen,
            params_sha256=None if params is None else record.params_sha256(params),
            metrics=self.progress.newest_metrics(),
            strategy=attempt.strategy,
            reduction=attempt.experiment.reduction,
            num_devices=attempt.num_devices,
            num_processes=attempt.num_processes,
            examples_per_second=self._examples_per_second(),
            step_seconds=self.step_times.summary(),
            time_seconds=seconds,
            compile_count=self.compile_count,
            restarts=earlier_attempts + self.process_restarts,
            config=attempt.experiment,
            versions=record.versions(),
            command=attempt.command,
            extra=self._extra_keys() | dict(self._extra()),
        )

    def _examples_per_second(self) -> float | None:
        """Return the examples seen per second in which the run trained or waited for input, which limits it too."""
        seconds = self.stopwatch.seconds()
        busy = seconds["input"] + seconds["compute"]
        return self.progress.examples_seen / busy if busy > 0 else None

    def _throughput(self) -> dict[str, float | None]:
        attempt = self.attempt
        return utilization.throughput(
            examples_per_second=self._examples_per_second(),
            global_batch_size=attempt.experiment.global_batch_size,
            num_devices=attempt.num_devices,
            tokens_per_example=utilization.tokens_per_example(attempt.fields, attempt.experiment.inputs),
            flops_per_step=self.flops_per_step,
            peak=utilization.peak_of(jax.local_devices()[0]),
        )

    def _find_origin(self) -> dict[str, Any]:
        earlier = self.attempt.earlier.extra if self.attempt.earlier else {}
        source = self.attempt.source
        folder = pathlib.Path(source.file).parent if source else pathlib.Path.cwd()
        is_first = jax.process_index() == 0
        return {
            "started": earlier.get("started") or datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "git": origin.git(folder) if is_first else None,
            "data_files": fingerprints.times_of(self.attempt.experiment.data.train) if is_first else None,
        }

    def _extra_keys(self) -> dict[str, Any]:
        fields = {
            name: {"shape": field.shape, "dtype": str(field.dtype)} for name, field in self.attempt.fields.items()
        }
        return {
            "identity": self.attempt.identity.to_json(),
            "init_from": self._began_with(),
            "experiment": dataclasses.asdict(self.attempt.source) if self.attempt.source else None,
            "batch": {
                "fields": fields,
                "steps_per_epoch": self.attempt.steps_per_epoch,
                "num_examples": len(self.attempt.experiment.data.train),
            },
            "best": self.progress.best,
            "changes": [
                *restart_events.changes(restart_events.read_events(self.attempt.run_dir)),
                *self.worker_changes,
            ],
            "checkpoint": self.checkpointer.latest_step(),
            "throughput": self._throughput(),
            "cpu_threads": comparison.cpu_threads(),
            "jax_settings": record.jax_settings(),
            "peak_memory_bytes": origin.peak_memory_bytes(jax.local_devices()),
            **self._origin,
        }

    def _began_with(self) -> dict[str, Any] | None:
        """Return the weights that the run began with, in this attempt or in an earlier one."""
        attempt = self.attempt
        if attempt.began_with is not None:
            return dataclasses.asdict(attempt.began_with)
        return attempt.earlier.extra.get("init_from") if attempt.earlier else None

    def report_nonfinite(self, report: str) -> None:
        """Write and show, on process 0, why a run ended as `nonfinite` and which checkpoint is the newest."""
        if jax.process_index() != 0:
            return
        saved = self.checkpointer.latest_step()
        kept = "No checkpoint was saved yet." if saved is None else f"The checkpoint of step {saved} is kept."
        print(f"{report}\n{kept}", file=sys.stderr)
        with contextlib.suppress(OSError):  # on a full disk what was shown has to do
            files.write_text(self.attempt.run_dir / directory.NONFINITE_NAME, f"{report}\n{kept}\n")

    def _write_metrics(self, step: int, stamped: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        self._measured |= dict.fromkeys(metrics, step)
        for writer in self._writers:
            writer.write(step, {**stamped, **metrics})

    def _best_value(self) -> dict[str, str]:
        best = self.progress.best
        if best is None:
            return {}
        return {f"best {best['metric']}": f"{writers.format_number(best['value'])} (step {best['step']})"}

    def _summary(self, made: record.RunRecord) -> dict[str, object]:
        """Return what a user is shown when a run has ended."""
        run_dir, saved = working_copy.shown(self.attempt.run_dir), self.checkpointer.latest_step()
        checkpoint = f"{run_dir}/{directory.CHECKPOINTS_NAME} (step {saved})"
        return {
            "end reason": made.end_reason,
            "step": made.step,
            **{name: writers.format_number(value) for name, value in confusion.evaluated(made.metrics).items()},
            **self._best_value(),
            "run record": f"{run_dir}/{record.FILE_NAME}",
            "metrics": f"{run_dir}/{writers.JSONL_NAME}",
            "checkpoint": "none was saved" if saved is None else checkpoint,
        }


def saved_at_mistake(step: int) -> str:
    """Return what the user is told when an error of theirs ends a run whose newest step is saved."""
    return f"Step {step} is saved: once the error is corrected, --resume continues from it."

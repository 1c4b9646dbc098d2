"""The run directory of an attempt: its name, whether it may be used, and its checkpoints."""

import dataclasses
import datetime
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from jaxdist.checkpoint import checkpoints
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError
from jaxdist.launch.joining import agreement
from jaxdist.run import components
from jaxdist.rundir import record, writers

CHECKPOINTS_NAME = "checkpoints"
SET_ASIDE_NAME = "set-aside"
"""Folder for checkpoints that are newer than one the user went back to."""
_RUN_FILES = (CHECKPOINTS_NAME, writers.JSONL_NAME, writers.CSV_NAME, writers.TENSORBOARD_NAME)


def default_run_dir(
    name: str,
    *,
    resume: bool,
    root: pathlib.Path = pathlib.Path("runs"),
    now: Callable[[], datetime.datetime] = datetime.datetime.now,
) -> pathlib.Path:
    """Return `runs/NAME-TIME`, the time down to microseconds, or, to resume, the newest such directory."""
    if not resume:
        return root / f"{name}-{now():%Y%m%d-%H%M%S-%f}"
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
        raise ConfigError(f"--resume needs a run to continue; {run_dir} holds none. Leave --resume out to start one.")
    earlier = _checked_record(identity, run_dir, resume=resume) if exists else None
    leftovers = [name for name in _RUN_FILES if (run_dir / name).exists()]
    if leftovers and not exists:
        raise ConfigError(
            f"{run_dir} holds {', '.join(leftovers)} but no {record.FILE_NAME}, so it is unclear which run they belong "
            "to. Choose another --run-dir, or move them away."
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"The run directory must be writable; {run_dir} is not: {error.strerror}.") from error
    return earlier


def _checked_record(identity: components.Identity, run_dir: pathlib.Path, *, resume: bool) -> record.RunRecord:
    earlier = record.RunRecord.read(run_dir)
    stored = earlier.extra.get("identity")
    theirs = stored if isinstance(stored, dict) else {}
    if theirs != dataclasses.asdict(identity):
        raise ConfigError(
            f"{run_dir} holds a run of another experiment: {identity.differences(theirs)}. Choose another --run-dir."
        )
    if not resume:
        raise ConfigError(f"{run_dir} already holds a run. Add --resume to continue it, or choose another --run-dir.")
    return earlier


def open_checkpoints(
    experiment: Experiment, run_dir: pathlib.Path, identity: components.Identity
) -> checkpoints.Checkpointer:
    """Return the checkpoints of a run directory."""
    return checkpoints.Checkpointer(run_dir / CHECKPOINTS_NAME, identity=str(identity), **what_stays(experiment))


def what_stays(experiment: Experiment) -> dict[str, Any]:
    """Return the settings of the Checkpointer that say which checkpoints are kept."""
    settings = experiment.checkpoints
    best_metric, best_mode = components.watched_metric(experiment)
    return {
        "keep_last": settings.keep_last,
        "keep_every": settings.keep_every,
        "best_metric": best_metric,
        "best_mode": best_mode,
    }


def recorded_identity(run_dir: pathlib.Path) -> Any:
    """Return the identity in the run record, None without a record that can be read."""
    try:
        return record.RunRecord.read(run_dir).extra.get("identity")
    except (OSError, ValueError):
        return None


def check_nothing_is_lost(
    earlier: record.RunRecord | None, run_dir: pathlib.Path, checkpointer: checkpoints.Checkpointer
) -> None:
    """Raise ConfigError where the run that is resumed had a checkpoint, and has none now."""
    saved = None if earlier is None else _saved_step(earlier)
    if saved is None or checkpointer.latest_step() is not None:
        return
    raise ConfigError(
        f"A run is resumed from its newest checkpoint; {run_dir / record.FILE_NAME} names a checkpoint of step "
        f"{saved}, and {run_dir / CHECKPOINTS_NAME} holds none. Restore {CHECKPOINTS_NAME}/, or start again in "
        "another --run-dir."
    )


def _saved_step(earlier: record.RunRecord) -> int | None:
    if "checkpoint" in earlier.extra:
        return earlier.extra["checkpoint"]
    # Records of version 0.1 lack the key; runs with these end reasons always saved their last step.
    saved = earlier.end_reason is not None and earlier.end_reason not in ("nonfinite", "hang", "error")
    return earlier.step if saved and earlier.step else None


def go_back(
    checkpointer: checkpoints.Checkpointer, run_dir: pathlib.Path, step: int, agreed: agreement.Agreement
) -> None:
    """Make `step` the newest checkpoint: move newer ones to the folder `set-aside`, which is never searched.

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

"""The run directory of an attempt: its name, whether it may be used, and its checkpoints."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxdist import adapters
from jaxdist.checkpoint import checkpoints, step_names
from jaxdist.config import starting_weights
from jaxdist.config.experiment import Experiment
from jaxdist.data import fingerprints
from jaxdist.data.sources import wrap
from jaxdist.errors import ConfigError, as_user_error, say
from jaxdist.launch.joining import agreement
from jaxdist.launch.supervising import job_memory, restart_events, supervisor
from jaxdist.run import components
from jaxdist.run.diagnosis import profiling
from jaxdist.run.replay import step_chain
from jaxdist.run.use.reporting import server_timeline
from jaxdist.rundir import full_disk, ledger, lock, record, writers

CHECKPOINTS_NAME = checkpoints.FOLDER_NAME
SET_ASIDE_NAME = "set-aside"
"""Folder for checkpoints that are newer than one the user went back to."""
REPLACED_NAME = "replaced"
"""Folder for the run that another one replaces, until that has saved a checkpoint."""
NONFINITE_NAME = "nonfinite.txt"
SERVERS_NAME = "ps"
"""Folder of the processes of a parameter server."""
SERVERS_SPEC_NAME = "spec.json"
"""File in it that exists if a parameter server trains in the run directory, or has trained there last."""
SAVED_CUTS = "[0-9]" * 10 + "-*"
"""The names of saved cuts in it: each begins with its step."""
_RUN_FILES = (CHECKPOINTS_NAME, writers.JSONL_NAME, writers.CSV_NAME, writers.TENSORBOARD_NAME)
_MORE_RUN_FILES = (SET_ASIDE_NAME, ledger.FILE_NAME, step_chain.FILE_NAME, NONFINITE_NAME, SERVERS_NAME)
_JOB_FILES = ("logs", restart_events.EVENTS_NAME, supervisor.BOARD_NAME)
_FOLDERS = (
    CHECKPOINTS_NAME,
    writers.TENSORBOARD_NAME,
    SET_ASIDE_NAME,
    REPLACED_NAME,
    SERVERS_NAME,
    profiling.FOLDER,
    "logs",
    supervisor.BOARD_NAME,
)
_FILES = (
    record.FILE_NAME,
    lock.FILE_NAME,
    writers.JSONL_NAME,
    writers.CSV_NAME,
    ledger.FILE_NAME,
    step_chain.FILE_NAME,
    NONFINITE_NAME,
    restart_events.EVENTS_NAME,
    server_timeline.FILE_NAME,
)
_SHAPING = ("model", "loss", "inputs", "optimizer", "precision")
"""The settings that decide the form of the saved state."""
_PARTS = {"init_from": [f"init_from.{field.name}" for field in dataclasses.fields(starting_weights.InitFrom)]}
_MOST_NAMED = 5


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


def prepare_run_dir(
    experiment: Experiment,
    identity: components.Identity,
    run_dir: pathlib.Path,
    *,
    resume: bool,
    overwrite: bool = False,
) -> record.RunRecord | None:
    """Create the run directory, or check that it may be used; return the record of the run to resume.

    With `overwrite` a run there may be replaced, which `set_run_aside` does once everything else is checked.

    Raises:
      ConfigError: not writable, holding another experiment's run, or a run that `resume` does not ask for; or
        nothing to resume. Nothing is overwritten.
    """
    check_names(run_dir)
    exists = (run_dir / record.FILE_NAME).exists()
    if resume and not exists:
        raise ConfigError(f"--resume needs a run to continue; {run_dir} holds none. Leave --resume out to start one.")
    earlier = record.RunRecord.read(run_dir) if exists else None
    if earlier is not None and not overwrite:
        _check_continues(experiment, identity, run_dir, earlier, resume=resume)
    leftovers = [name for name in _RUN_FILES if (run_dir / name).exists()]
    if leftovers and not exists:
        raise ConfigError(
            f"{run_dir} holds {', '.join(leftovers)} but no {record.FILE_NAME}, so it is unclear which run they belong "
            "to. Choose another --run-dir, or move them away."
        )
    _check_writable(run_dir, needs_room=not exists)
    return None if overwrite else earlier


def take_run_dir(
    run_dir: pathlib.Path,
    prepare: Callable[[], record.RunRecord | None],
    stack: contextlib.ExitStack,
    *,
    purpose: str,
) -> record.RunRecord | None:
    """Lock the run directory until `stack` is closed; return what `prepare`, see `prepare_run_dir`, returns under it.

    A run that `prepare` refuses leaves no files, so it is called before there is a lock; and again with the lock, since
    another job may have begun, or ended, in between.

    Raises:
      LockedError: another job works there. To be told that comes first: what it writes is not there to be resumed yet.
      ConfigError: see `prepare_run_dir`.
    """
    lock.check_free(run_dir)
    prepare()
    stack.enter_context(lock.locked(run_dir, purpose=purpose))
    return prepare()


def check_names(run_dir: pathlib.Path) -> None:
    """Raise ConfigError where something else has the name of a file or folder of a run: it would end the run later."""
    for name in (*_FOLDERS, *_FILES):
        path, kind = run_dir / name, "file" if name in _FILES else "folder"
        if path.exists() and not (path.is_file() if kind == "file" else path.is_dir()):
            found = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"
            raise ConfigError(
                f"The {kind} {name} of a run directory belongs to its run; {path} is {found}. Move it away, or choose "
                "another --run-dir."
            )


def tell_of_times(experiment: Experiment, earlier: record.RunRecord | None) -> None:
    """Say where files of equal sizes and samples have other times than in the run that is resumed, if one is.

    Their contents may differ elsewhere.
    """
    if earlier is None or experiment.data.strict or jax.process_index() != 0:
        return
    then, now = earlier.extra.get("data_files"), fingerprints.times_of(wrap.as_source(experiment.data.train))
    if then and now and then.get("times") != now["times"]:
        say(
            "The times of the files of data.train have changed since the run was recorded; their names, sizes "
            "and the sampled contents have not. If they were copied, all is well; if some were edited, it continues "
            "with other data. A run that is started with --strict compares all contents."
        )


def tell_of_edits(experiment: Experiment, earlier: record.RunRecord | None, hashes: Mapping[str, str]) -> None:
    """Say what of the experiment was changed since the run that is resumed was recorded, if one is.

    `hashes` are those of its files. Another rate, or another function of one name, leaves the state its form.
    """
    if earlier is None or not earlier.config or jax.process_index() != 0:
        return
    then = (earlier.extra.get("experiment") or {}).get("hashes") or {}
    edited = [f"the file {name}" for name, found in hashes.items() if then.get(name, found) != found]
    changed = "; ".join(filter(None, (changed_settings(experiment, earlier.config, _SHAPING), *edited)))
    if changed:
        say(f"Since the run was recorded, this was changed: {changed}. It continues so.")


def _check_writable(run_dir: pathlib.Path, *, needs_room: bool) -> None:
    """Create the run directory if needed; raise ConfigError if nothing can be written to it."""
    is_new = not run_dir.exists()
    with as_user_error():
        step_names.check_spelling(run_dir.absolute())
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise ConfigError(
            f"A run directory is a folder; {run_dir} is a file, or a link to nothing. Choose another, or remove it."
        ) from error
    except OSError as error:
        raise ConfigError(f"The run directory must be writable; {run_dir} is not: {error.strerror}.") from error
    if needs_room and full_disk.has_no_room(run_dir):
        if is_new:
            with contextlib.suppress(OSError):  # another process of the job was first
                run_dir.rmdir()
        raise ConfigError(f"A run needs room on its disk; that of {run_dir} is full. Free space, or choose another.")


def _check_continues(
    experiment: Experiment,
    identity: components.Identity,
    run_dir: pathlib.Path,
    earlier: record.RunRecord,
    *,
    resume: bool,
) -> None:
    theirs = earlier.extra.get("identity") or {}
    if theirs != identity.to_json():
        raise ConfigError(
            f"{run_dir} holds a run of another experiment: {_what_differs(experiment, identity, theirs, earlier)}. To "
            "resume that run, set this as it was. To start a new one, choose another --run-dir, or replace the run "
            "with --overwrite."
        )
    if not resume:
        raise ConfigError(
            f"{run_dir} already holds a run. Continue it with --resume, replace it with --overwrite, or choose another "
            "--run-dir."
        )


def _what_differs(
    experiment: Experiment, identity: components.Identity, theirs: Mapping[str, Any], earlier: record.RunRecord
) -> str:
    """Return which settings make another identity, the setting itself where the record holds it."""
    found = []
    for name, ours in dataclasses.asdict(identity).items():
        if ours == theirs.get(name, ""):
            continue
        if name == "data":
            found.append(_changed_data(experiment, identity, theirs, earlier))
        else:
            weights_only = name == "init_from" and None in (experiment.init_from, earlier.config.get("init_from"))
            parts = ("init_from.path",) if weights_only else _PARTS.get(name, (name,))
            changed = changed_settings(experiment, earlier.config, parts)
            found.append(changed or f"{name}, in what the record does not show ({theirs.get(name)} -> {ours})")
    return "; ".join(found)


def _changed_data(
    experiment: Experiment, identity: components.Identity, theirs: Mapping[str, Any], earlier: record.RunRecord
) -> str:
    kinds = changed_settings(experiment, earlier.config, ("data.train",))
    before = earlier.extra.get("batch", {}).get("num_examples")
    now = len(experiment.data.train)
    if before not in (None, now):
        found = f"data.train {before:,} examples -> {now:,} examples"
    elif (was_strict := str(theirs.get("data", "")).startswith(fingerprints.STRICT)) != experiment.data.strict:
        found = "data.train was compared by " + ("all of its contents, with --strict" if was_strict else "samples only")
    else:
        found = f"data.train holds other examples (fingerprint {theirs.get('data')} -> {identity.data})"
    return "; ".join(filter(None, (kinds, found)))


def changed_settings(experiment: Experiment, config: Any, names: Sequence[str]) -> str:
    """Return how settings, or groups of them, differ from a recorded `config`: "model.width 64 -> 32; seed 0 -> 1"."""
    now, then = json.loads(json.dumps(record.plain(experiment))), dict(config)
    for settings in (now, then):
        model = settings.get("model")
        if isinstance(experiment.model, adapters.Functions) and isinstance(model, dict):
            settings["model"] = {name: value for name, value in model.items() if name != "predict_fn"}
    found = [change for name in names for change in record.differences(name, _setting(then, name), _setting(now, name))]
    more = [f"{len(found) - _MOST_NAMED} more settings"] if len(found) > _MOST_NAMED else []
    return "; ".join([*found[:_MOST_NAMED], *more])


def _setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


@contextlib.contextmanager
def naming_what_changed(experiment: Experiment, earlier: record.RunRecord | None) -> Iterator[None]:
    """Add to a CheckpointError the settings that were changed since the record, of those that shape the state."""
    try:
        yield
    except checkpoints.CheckpointError as error:
        changed = changed_settings(experiment, earlier.config, _SHAPING) if earlier else ""
        if not changed:
            raise
        raise ConfigError(f"{error} Since the run was recorded, this was changed: {changed}.") from error


def set_run_aside(run_dir: pathlib.Path, *, of_job: bool) -> None:
    """Move the run in `run_dir` to the folder `replaced`, and none of a user's other files; the record goes last.

    It stays there until the new run has saved a checkpoint (see `forget_replaced`), so that whenever a process is
    killed one of the two can be continued. A run that has saved none has replaced nothing yet: it is removed, and what
    it was to replace is kept. What the run left in memory is removed.

    The lock of the directory is held. Of a supervised job, `of_job`, the logs of the present one are there already, and
    stay.
    """
    aside = run_dir / REPLACED_NAME
    saved = run_dir / CHECKPOINTS_NAME
    if (aside / record.FILE_NAME).exists() and saved.is_dir() and any(path.name.isdigit() for path in saved.iterdir()):
        shutil.rmtree(aside)
    keeps = not (aside / record.FILE_NAME).exists()
    names = [*_RUN_FILES, *_MORE_RUN_FILES, *(() if of_job else _JOB_FILES), record.FILE_NAME]
    for name in names:
        if keeps and os.path.lexists(run_dir / name) and not os.path.lexists(aside / name):
            aside.mkdir(exist_ok=True)
            (run_dir / name).rename(aside / name)
        else:
            _remove(run_dir / name)
    for memory in job_memory.left_behind(run_dir):
        shutil.rmtree(memory)


def forget_replaced(run_dir: pathlib.Path) -> None:
    """Remove the run that the present one has replaced; call it once this one has a checkpoint."""
    _remove(run_dir / REPLACED_NAME)


def forget_refused(run_dir: pathlib.Path, before: Collection[str] | None) -> None:
    """Remove what a job that was refused left in its run directory, which holds no run.

    `before` are the names that were there before the job; None if the directory did not exist. Another job that has
    begun there since the lock was released keeps its files.
    """
    if _holds_run(run_dir) or not run_dir.is_dir():
        return
    with contextlib.suppress(lock.LockedError), lock.locked(run_dir, purpose="removing what a refused job left"):
        if _holds_run(run_dir):
            return
        for name in set(_JOB_FILES) - set(before or ()):
            _remove(run_dir / name)
        if lock.FILE_NAME not in (before or ()):  # last: it keeps other jobs away
            _remove(run_dir / lock.FILE_NAME)
        if before is None:
            with contextlib.suppress(OSError):  # a user put something there meanwhile
                run_dir.rmdir()


def _holds_run(run_dir: pathlib.Path) -> bool:
    return (run_dir / record.FILE_NAME).exists() or (run_dir / CHECKPOINTS_NAME).exists()


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_checkpoints(
    experiment: Experiment, run_dir: pathlib.Path, identity: components.Identity
) -> checkpoints.Checkpointer:
    """Return the checkpoints of a run directory."""
    with as_user_error():
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
    made = record.readable(run_dir)
    return None if made is None else made.extra.get("identity")


def when_started(run_dir: pathlib.Path) -> str | None:
    """Return when the run in `run_dir` began, None without a record that can be read."""
    made = record.readable(run_dir)
    return None if made is None else made.extra.get("started")


def check_nothing_is_lost(
    earlier: record.RunRecord | None, run_dir: pathlib.Path, checkpointer: checkpoints.Checkpointer
) -> None:
    """Raise ConfigError where the run that is resumed had a checkpoint, and has none now."""
    saved = None if earlier is None else earlier.extra.get("checkpoint")
    if saved is None or checkpointer.latest_step() is not None:
        return
    moved = run_dir / REPLACED_NAME / CHECKPOINTS_NAME
    where = f"Restore {CHECKPOINTS_NAME}/" + (f" from {moved}" if moved.exists() else "")
    raise ConfigError(
        f"A run is resumed from its newest checkpoint; {run_dir / record.FILE_NAME} names a checkpoint of step "
        f"{saved}, and {run_dir / CHECKPOINTS_NAME} holds none. {where}, or start again in "
        "another --run-dir."
    )


def tell_what_is_gone(earlier: record.RunRecord | None, run_dir: pathlib.Path, step: int) -> None:
    """Say on stderr that a run continues from `step` because the newer checkpoint of its record is gone."""
    saved = None if earlier is None else earlier.extra.get("checkpoint")
    if saved is not None and step < saved:
        say(
            f"{run_dir / record.FILE_NAME} names a checkpoint of step {saved}, which is gone; training "
            f"continues from step {step}."
        )


def leave_servers(run_dir: pathlib.Path, step: int) -> None:
    """Note that the run continues from `step` without the parameter server that trained it before, if one did.

    What it saved since the checkpoint is of another future: it would be taken for the newest state later. Who joins
    the run is not sent to its processes.
    """
    folder = run_dir / SERVERS_NAME
    (folder / SERVERS_SPEC_NAME).unlink(missing_ok=True)
    newest = 0
    for path in sorted(folder.glob(SAVED_CUTS)):
        newest = int(path.name[:10])
        aside = run_dir / SET_ASIDE_NAME / SERVERS_NAME / path.name
        _remove(aside)
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
    if newest > step:
        say(
            f"The parameter server that trained here has saved a cut of step {newest}, which only a parameter server "
            f"continues from. Training continues from step {step}; the cut is in {run_dir / SET_ASIDE_NAME}."
        )


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

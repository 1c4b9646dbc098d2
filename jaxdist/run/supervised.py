"""Attempts under a supervisor, which starts the processes: all of a job, or one host's part of it."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import IO

import jax

from jaxdist.config.experiment import Experiment
from jaxdist.errors import ExitStatus
from jaxdist.launch.joining import agreement
from jaxdist.launch.supervising import fork_server, hosts, local_job, supervisor
from jaxdist.run import components, directory, recovery, rescue


def supervise(
    experiment: Experiment,
    arguments: Sequence[str],
    *,
    run_dir: pathlib.Path,
    num_processes: int,
    forks: fork_server.ForkServer | None = None,
    checkpoint: int | None = None,
    overwrite: bool = False,
) -> int:
    """Run the command line `arguments` in `num_processes` supervised processes; return the exit status.

    The processes are forked by `forks` if possible, and started as new interpreters otherwise. With `checkpoint` they
    continue from that step, and newer ones are set aside; a restart after a failure continues from the newest.
    With `overwrite` they replace the run in `run_dir`, once all their checks have passed.
    """
    directory.check_names(run_dir)
    replaced = directory.when_started(run_dir) if overwrite else None

    def start(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> local_job.Process:
        child = forks.start(command, environment, output) if forks else None
        return child or local_job.start(command, environment, output)

    def begin() -> None:
        if checkpoint is not None:
            directory.go_back(checkpointer, run_dir, checkpoint, agreement.Alone())

    def saved_step(memory: pathlib.Path) -> int:
        if replaced is not None and directory.when_started(run_dir) == replaced:
            return 0  # what is there is of the run that will be replaced
        return recovery.saved_step(memory, checkpointer, str(identity))

    def at_kill(memory: pathlib.Path) -> None:
        if forks:
            forks.run_at_end("jaxdist.run.killed_supervisor", saved.to_text(), str(memory))

    jax.config.update("jax_platforms", "cpu")  # the accelerators belong to the processes
    identity = components.identity(experiment)
    saved = rescue.Rescue.of(run_dir, identity, directory.what_stays(experiment))
    with contextlib.closing(directory.open_checkpoints(experiment, run_dir, identity)) as checkpointer:
        job = supervisor.Job(
            command=_command([*arguments, *([] if replaced is None else ["--replace", replaced])]),
            run_dir=run_dir,
            saved_step=saved_step,
            start=start,
            save=saved.save,
            save_left=directory.recorded_identity(run_dir) == identity.to_json(),
            preload=forks.preload if forks else lambda names: None,
            at_kill=at_kill,
            begin=begin,
        )
        before = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else None
        status = supervisor.run(job, num_processes=num_processes, settings=experiment.recovery)
    if status == ExitStatus.USER:
        directory.forget_refused(run_dir, before)
    return status


def supervise_host(experiment: Experiment, arguments: Sequence[str], host: hosts.Host, *, run_dir: pathlib.Path) -> int:
    """Run one host's part of a job on several, the command line `arguments` in each process; return the exit status."""
    directory.check_names(run_dir)
    identity = components.identity(experiment)
    with contextlib.closing(directory.open_checkpoints(experiment, run_dir, identity)) as checkpointer:
        return hosts.run(
            host,
            _command(arguments),
            run_dir=run_dir,
            saved=hosts.Saved(
                identity=str(identity),
                newest_step=lambda memory: recovery.saved_step(memory, checkpointer, str(identity)),
                save=rescue.Rescue.of(run_dir, identity, directory.what_stays(experiment)).save,
            ),
            settings=dataclasses.replace(experiment.recovery, min_processes=None),
        )


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "jaxdist.cli", *arguments]

"""A parameter-server run from its settings to its record: checks, resumes, starts the processes, watches them."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence

from jaxdist import checkpoint, errors, lock, record
from jaxdist.config import load_experiment, override
from jaxdist.launch import local
from jaxdist.paramserver import membership, observer, resume, wire
from jaxdist.paramserver import process as processes
from jaxdist.paramserver import training as plans
from jaxdist.paramserver.crew import LocalCrew
from jaxdist.paramserver.settings import SCHEDULER, worker_name
from jaxdist.train import make_checkpointer, prepare_run_dir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line decides.

    Attributes:
      experiment: path of the experiment file.
      run_dir: where everything goes.
      assignments: overrides of the experiment, `ps.` ones among them.
      resume: go on from the newest checkpoint in `run_dir`.
      devices: devices of each worker.
      silent: show nothing.
      command: for the run record.
      stop_requested: asked often; True ends the run as preempted.
    """

    experiment: str
    run_dir: pathlib.Path
    assignments: Sequence[str] = ()
    resume: bool = False
    devices: int = 1
    silent: bool = False
    command: str = ""
    stop_requested: Callable[[], bool] = lambda: False


def train(options: Options) -> record.RunRecord:
    """Train by parameter server until the stop rule ends it; return the run record, which is written too.

    Raises:
      UserError: settings that cannot work, a run directory that cannot be used, a checkpoint that is damaged.
      RunFailedError: a process that dies again and again, or a loss that the chosen durability cannot make good.
    """
    with contextlib.ExitStack() as stack:
        with errors.as_user_error():
            experiment = override(load_experiment(options.experiment), options.assignments)
            plan = plans.make_plan(experiment, experiment.ps)
            earlier = prepare_run_dir(experiment, options.run_dir, resume=options.resume)
            stack.enter_context(lock.locked(options.run_dir, purpose=options.command))
            directory = options.run_dir / processes.DIRECTORY_NAME
            checkpointer = stack.enter_context(contextlib.closing(make_checkpointer(experiment, options.run_dir)))
            start = resume.begin(plan, checkpointer, directory)
            spec = _write_spec(options, plan, start, directory)
        return _watch(options, plan, spec, start, earlier, checkpointer)


def _write_spec(options: Options, plan: plans.Plan, start: resume.Start, directory: pathlib.Path) -> processes.Spec:
    """Remove what belongs to an earlier attempt only, and write down what every process must know."""
    for name in (processes.LOG_NAME, processes.CUT_NAME, processes.STEPS_NAME, processes.SPEC_NAME):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / processes.STATISTICS_NAME, ignore_errors=True)
    with _ports(plan) as peers:
        spec = processes.Spec(
            experiment=str(pathlib.Path(options.experiment).absolute()),
            assignments=list(options.assignments),
            settings=dataclasses.asdict(plan.settings),
            peers=peers,
            directory=str(directory.absolute()),
            resume=start.snapshot,
            devices=options.devices,
            kind=plan.kind,
        )
        spec.write(directory / processes.SPEC_NAME)
    return spec


@contextlib.contextmanager
def _ports(plan: plans.Plan) -> Iterator[dict[str, str]]:
    with contextlib.ExitStack() as stack:
        names = [processes.OBSERVER, *part_names(plan)]
        yield {name: f"{local.LOOPBACK}:{stack.enter_context(local.reserved_port())}" for name in names}


def part_names(plan: plans.Plan) -> list[str]:
    """Return the names of all processes of a run, the observer apart."""
    workers = [worker_name(number) for number in range(plan.settings.workers)]
    return [SCHEDULER, *membership.server_nodes(plan.settings), *workers]


def _watch(
    options: Options,
    plan: plans.Plan,
    spec: processes.Spec,
    start: resume.Start,
    earlier: record.RunRecord | None,
    checkpointer: checkpoint.Checkpointer,
) -> record.RunRecord:
    watcher = observer.Observer(
        plan,
        options.run_dir,
        start,
        earlier,
        checkpointer,
        silent=options.silent,
        command=options.command,
        num_devices=options.devices,
    )
    watcher.write_record(None)
    token = wire.new_token()
    crew = LocalCrew(part_names(plan), pathlib.Path(spec.directory), token)
    line = wire.Wire(
        listen=spec.peers[processes.OBSERVER],
        peers=spec.peers,
        receive=lambda message: None,
        security=wire.Security(token=token),
    )
    try:
        made = watcher.run(crew, line.send, options.stop_requested)
    finally:
        crew.close(orderly=watcher.end_reason is not None)
        line.close()
    return made
